"""Linear layers in 16 bits: torch's matmul, with the bias in its epilogue.

There is no residual here. torch's matmul would first copy it into the output, a pass of its own;
the next norm adds it while it reads its input anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import bfloat16, dtype, float16, float32

from sd_kernels.sd_v2_shapes import BATCH, SD_V2, Architecture, res_blocks, transformers
from sd_kernels.spec import Backend, Case, Draw, Inputs, Matmuls, OpSpec, Work, counted


@dataclass(frozen=True)
class Extras:
    """Whether there is a bias."""

    bias: bool


Call = tuple[str, int, int, int, bool]
"""name, rows of a sample, columns in, columns out, whether there is a bias"""


def _calls(unet: Architecture) -> list[Call]:
    """Every linear layer, where several that read the same input are packed into one.

    These are q, k and v of a self-attention, the keys and values of the text for all transformers,
    and the time projections of all ResBlocks.
    """
    calls: list[Call] = []
    for layer in transformers(unet):
        L, C = layer.side**2, layer.channels
        outputs = [("projection in or out", C, C, True)] * 2 + [
            ("self qkv", C, 3 * C, False),
            ("cross q", C, C, False),
        ]
        outputs += [("attention out", C, C, True)] * 2 + [("feed-forward in", C, 8 * C, True)]
        calls += [
            (name, L, K, N, bias)
            for name, K, N, bias in [*outputs, ("feed-forward out", 4 * C, C, True)]
        ]
    texts = sum(2 * layer.channels for layer in transformers(unet))
    times = sum(block.channels for block in res_blocks(unet))
    calls.append(
        ("keys and values of all texts", unet.context_length, unet.context_width, texts, False)
    )
    width, embedding = unet.stem, 4 * unet.stem
    calls += [("time in", 1, width, embedding, True), ("time out", 1, embedding, embedding, True)]
    return [*calls, ("all time projections", 1, embedding, times, True)]


def _case(call: Call) -> Case:
    name, L, K, N, bias = call
    shape = {"B": BATCH, "L": L, "K": K, "N": N}
    return Case(f"{name}, {L} x {K} to {N}", shape, extras=Extras(bias))


def _small(name: str, L: int, K: int, N: int, bias: bool = True, **draw: Any) -> Case:
    shape = {"B": 2, "L": L, "K": K, "N": N}
    return Case(name, shape, draw=Draw(**draw), extras=Extras(bias))


def _inputs(case: Case, make: Inputs) -> dict[str, Any]:
    B, L, K, N = case.sizes("B", "L", "K", "N")
    weight = make.tensor(N, K, std=K**-0.5).detach().contiguous().requires_grad_()
    return {
        "x": make.data(B, L, K),
        "weight": weight,
        "bias": make.tensor(N, std=0.3) if case.extras.bias else None,
    }


def _matmuls(case: Case) -> Matmuls:
    B, L, K, N = case.sizes("B", "L", "K", "N")
    return Matmuls(rows=B * L, columns=N, channels=K, bias=case.extras.bias)


def _work(case: Case, dtype: dtype) -> Work:
    B, L, K, N = case.sizes("B", "L", "K", "N")
    once = (B * L * (K + N) + N * K) * dtype.itemsize
    return Work(2.0 * B * L * K * N, once, 2 * once)


SPEC = OpSpec(
    name="linear",
    summary="matmul with a weight, and bias",
    backends=(
        Backend("torch", f"{__name__}.aten", yardstick=True),
        Backend("reference", f"{__name__}.reference"),
    ),
    cases=counted(_calls(SD_V2), _case),
    cases_of=lambda unet: counted(_calls(unet), _case),
    small_cases=(
        _small("tiny", 2, 3, 4),
        _small("no bias", 5, 32, 48, bias=False),
        _small("77 tokens", 77, 64, 32, bias=False),
        _small("rows apart", 6, 64, 16, padding=8),
        _small("one row", 1, 320, 1280),
    ),
    inputs=_inputs,
    work=_work,
    family="linear",
    matmuls=_matmuls,
    dtypes=(bfloat16, float16, float32),
)
