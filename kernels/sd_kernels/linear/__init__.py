"""Linear layers in 16 bits: torch's matmul, with the bias in its epilogue.

There is no residual here. torch's matmul would first copy it into the output, a pass of its own;
the next norm adds it while it reads its input anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import bfloat16, dtype, float16, float32

from sd_kernels.sd_v2_shapes import BATCH, SD_V2, Architecture, res_blocks, transformers
from sd_kernels.spec import Backend, Case, Draw, Inputs, Matmuls, OpSpec, Work, counted


@dataclass(frozen=True)
class Extras:
    """Whether there is a bias, and whether it takes a gradient here, not in the LayerNorm after."""

    bias: bool
    bias_gradient: bool


class _Call(NamedTuple):
    name: str
    rows: int
    """of a sample"""
    columns_in: int
    columns_out: int
    bias: bool = True
    bias_gradient: bool = False
    """whether torch sums it; LayerNorm does so for the layers whose output it reads"""


def _calls(unet: Architecture) -> list[_Call]:
    """Every linear layer, where several that read the same input are packed into one.

    These are q, k and v of a self-attention, the keys and values of the text for all transformers,
    and the time projections of all ResBlocks.
    """
    calls: list[_Call] = []
    for layer in transformers(unet):
        L, C = layer.side**2, layer.channels
        calls += [_Call("projection in", L, C, C), _Call("projection out", L, C, C, bias=False)]
        calls.append(_Call("self qkv", L, C, 3 * C, bias=False))
        calls.append(_Call("cross q", L, C, C, bias=False))
        calls += [_Call("attention out", L, C, C)] * 2
        # GEGLU adds the bias of "feed-forward in".
        calls.append(_Call("feed-forward in", L, C, 8 * C, bias=False))
        calls.append(_Call("feed-forward out", L, 4 * C, C))
    texts = sum(2 * layer.channels for layer in transformers(unet))
    times = sum(block.channels for block in res_blocks(unet))
    context, width, embedding = unet.context_width, unet.stem, 4 * unet.stem
    return [
        *calls,
        _Call("keys and values of all texts", unet.context_length, context, texts, bias=False),
        _Call("time in", 1, width, embedding, bias_gradient=True),
        _Call("time out", 1, embedding, embedding, bias_gradient=True),
        _Call("all time projections", 1, embedding, times, bias_gradient=True),
    ]


def _case(call: _Call) -> Case:
    name, L, K, N, *bias = call
    shape = {"B": BATCH, "L": L, "K": K, "N": N}
    return Case(f"{name}, {L} x {K} to {N}", shape, extras=Extras(*bias))


def _small(name: str, L: int, K: int, N: int, bias: bool = True, **draw: Any) -> Case:
    shape = {"B": 2, "L": L, "K": K, "N": N}
    return Case(name, shape, draw=Draw(**draw), extras=Extras(bias, bias_gradient=bias))


def _inputs(case: Case, make: Inputs) -> dict[str, Any]:
    B, L, K, N = case.sizes("B", "L", "K", "N")
    weight = make.tensor(N, K, std=K**-0.5).detach().contiguous().requires_grad_()
    bias = make.tensor(N, std=0.3) if case.extras.bias else None
    if bias is not None and not case.extras.bias_gradient:
        bias = bias.detach()
    return {"x": make.data(B, L, K), "weight": weight, "bias": bias}


def _matmuls(case: Case) -> Matmuls:
    B, L, K, N = case.sizes("B", "L", "K", "N")
    return Matmuls(rows=B * L, columns=N, channels=K, bias=case.extras.bias_gradient)


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
