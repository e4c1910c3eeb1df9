"""Linear layers on FP8 matrix units, fused with the GEGLU or LayerNorm that makes their input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import bfloat16, dtype, float16

from sd_kernels.sd_v2_shapes import BATCH, transformers
from sd_kernels.spec import Backend, Case, Draw, Inputs, OpSpec, Work, counted


@dataclass(frozen=True)
class Extras:
    """What the call is given besides x and weight."""

    bias: bool
    residual: bool


class _Call(NamedTuple):
    producer: str
    tokens: int
    """of a sample"""
    columns_in: int
    columns_out: int
    bias: bool = False
    residual: bool = False


def _calls() -> list[_Call]:
    """The linear layers within every transformer block; all others stay in 16 bits."""
    calls: list[_Call] = []
    for layer in transformers():
        L, C = layer.side**2, layer.channels
        # Queries, keys and values of the self-attention; then queries of the cross-attention, whose
        # LayerNorm first adds the output of the self-attention.
        calls.append(_Call("layer_norm", L, C, 3 * C))
        calls.append(_Call("layer_norm", L, C, C, residual=True))
        # The output layers of both attentions.
        calls += [_Call("none", L, C, C, bias=True)] * 2
        # The two layers of the feed-forward.
        calls.append(_Call("layer_norm", L, C, 8 * C, bias=True, residual=True))
        calls.append(_Call("geglu", L, 4 * C, C, bias=True))
    return calls


def _case(call: _Call) -> Case:
    producer, L, K, N, bias, residual = call
    name = f"{producer} {L} x {K} to {N}"
    return _make(name, BATCH, L, K, N, producer, bias=bias, residual=residual)


def _make(
    name: str,
    B: int,
    L: int,
    K: int,
    N: int,
    producer: str,
    bias: bool,
    residual: bool,
    **draw: Any,
) -> Case:
    shape = {"B": B, "L": L, "K": K, "N": N}
    extras = Extras(bias=bias, residual=residual)
    return Case(name, shape, {"producer": producer}, Draw(**draw), extras)


def _small(
    name: str,
    L: int,
    K: int,
    N: int,
    producer: str = "none",
    bias: bool = True,
    residual: bool = False,
    **draw: Any,
) -> Case:
    return _make(name, 1, L, K, N, producer, bias=bias, residual=residual, **draw)


def _inputs(case: Case, make: Inputs) -> dict[str, Any]:
    (B, L, K, N), producer = case.sizes("B", "L", "K", "N"), case.options["producer"]
    is_norm = producer == "layer_norm"
    return {
        "x": make.data(B, L, 2 * K if producer == "geglu" else K),
        "weight": make.tensor(N, K, std=K**-0.5).detach().contiguous().requires_grad_(),
        "bias": make.tensor(N, std=0.3) if case.extras.bias else None,
        "residual": make.data(B, L, K) if case.extras.residual else None,
        "norm_weight": make.tensor(K, mean=1.0, std=0.3) if is_norm else None,
        "norm_bias": make.tensor(K, std=0.3) if is_norm else None,
        **case.options,
    }


def _work(case: Case, dtype: dtype) -> Work:
    """The bytes of `quantise`'s sweeps and of the three matmuls that read what these wrote.

    Every operand of a matmul is written in FP8 twice, as it is and transposed: one byte a number
    each. The matmul of the forward pass reads one copy, those of the backward pass the other.
    """
    B, L, K, N = case.sizes("B", "L", "K", "N")
    producer, wide = case.options["producer"], dtype.itemsize
    M = B * L
    sources = M * K * wide * (2 if producer == "geglu" else 1)
    # A residual is read once, and the sum written once; so are their gradients.
    residual = M * K * wide * 2 if case.extras.residual else 0
    # Forward sweeps twice over x and over the weight, writes both copies of each, then multiplies.
    operands, results = 2 * (M * K + N * K), M * N * wide
    forward = 2 * sources + residual + 2 * N * K * wide + operands + M * K + N * K + results
    # Backward sweeps twice over the gradient, writes and reads both its copies, reads the other
    # copies of x and weight, and writes the two gradients; the producer's gradient comes last.
    backward = 2 * results + 2 * M * N + 2 * M * N + M * K + N * K + M * K * wide + N * K * wide
    backward += {"none": 0, "geglu": 2 * sources, "layer_norm": sources + residual}[producer]
    return Work(2.0 * M * N * K, forward, backward)


SPEC = OpSpec(
    name="fp8_linear",
    summary="GEGLU or LayerNorm, rounding to FP8, linear",
    backends=(
        Backend("triton", f"{__name__}.triton", ours=True, capability=(8, 9)),
        Backend(
            "te",
            f"{__name__}.te",
            package="transformer_engine 2.20.2",
            install="pip install --no-build-isolation 'transformer_engine[pytorch]'",
            capability=(8, 9),
        ),
        Backend("reference", f"{__name__}.reference"),
    ),
    cases=counted(_calls(), _case),
    small_cases=(
        _small("tiny", 3, 16, 16),
        _small("after GEGLU", 40, 64, 48, "geglu"),
        _small("after LayerNorm", 21, 320, 64, "layer_norm", residual=True),
        _small("after LayerNorm, nothing added", 16, 64, 32, "layer_norm", mean=-2.3, std=0.5),
        _small("77 tokens", 77, 128, 96),
        _small("no bias", 24, 64, 48, "layer_norm", bias=False, residual=True),
        _small("several tiles", 150, 144, 80, "geglu"),
        _small("one row", 1, 1280, 16),
        _small("rows apart", 20, 64, 16, padding=16),
    ),
    inputs=_inputs,
    work=_work,
    family="linear",
    outputs=("y", "summed"),
    dtypes=(bfloat16, float16),
)
