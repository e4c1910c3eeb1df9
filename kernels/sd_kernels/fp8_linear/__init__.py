"""Linear layers on FP8 matrix units, fused with the GEGLU or LayerNorm that makes their input."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import arange, bfloat16, dtype, float16, float32

from sd_kernels.fp8_linear.scaling import SLOTS, Scales
from sd_kernels.reasons import Reason
from sd_kernels.sd_v2_shapes import BATCH, transformers
from sd_kernels.spec import Backend, Case, Draw, Inputs, OpSpec, Work, counted


@dataclass(frozen=True)
class Extras:
    """What the call is given besides x and weight."""

    bias: bool
    residual: bool
    delayed: bool = False
    """whether it is given the scales of earlier steps"""


INVERSE = 1 / 32
"""inverse delayed scale of the first slot: normal numbers stay well within 448 / 32"""


class _Call(NamedTuple):
    producer: str
    tokens: int
    """of a sample"""
    columns_in: int
    columns_out: int
    bias: bool = False
    residual: bool = False
    delayed: bool = False


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


def _delayed_calls() -> list[_Call]:
    """With delayed scaling: each feed-forward, and layers with each other producer."""
    calls: list[_Call] = []
    for layer in transformers():
        L, C = layer.side**2, layer.channels
        calls.append(_Call("layer_norm", L, C, C, residual=True, delayed=True))
        calls.append(_Call("none", L, C, C, bias=True, delayed=True))
        calls.append(_Call("feed_forward", L, 4 * C, C, bias=True, residual=True, delayed=True))
    return calls


def _case(call: _Call) -> Case:
    producer, L, K, N, bias, residual, delayed = call
    name = f"{producer} {L} x {K} to {N}{', delayed' if delayed else ''}"
    extras = Extras(bias=bias, residual=residual, delayed=delayed)
    return _make(name, BATCH, L, K, N, producer, extras)


def _alternative(call: _Call) -> Case:
    """A call that a step makes instead of others, so that it does not count for the step."""
    return replace(_case(call), calls=0)


def _make(
    name: str, B: int, L: int, K: int, N: int, producer: str, extras: Extras, **draw: Any
) -> Case:
    shape = {"B": B, "L": L, "K": K, "N": N}
    return Case(name, shape, {"producer": producer}, Draw(**draw), extras)


def _small(
    name: str,
    L: int,
    K: int,
    N: int,
    producer: str = "none",
    bias: bool = True,
    residual: bool = False,
    delayed: bool = False,
    **draw: Any,
) -> Case:
    extras = Extras(bias=bias, residual=residual, delayed=delayed)
    return _make(name, 1, L, K, N, producer, extras, **draw)


def _width(case: Case) -> int:
    """The columns of x; a feed-forward is four times as wide within."""
    K = case.shape["K"]
    return {"geglu": 2 * K, "feed_forward": K // 4}.get(case.options["producer"], K)


def _inputs(case: Case, make: Inputs) -> dict[str, Any]:
    (B, L, K, N), width = case.sizes("B", "L", "K", "N"), _width(case)
    is_feed_forward = case.options["producer"] == "feed_forward"
    is_norm = is_feed_forward or case.options["producer"] == "layer_norm"

    def matrix(N: int, K: int) -> Any:
        return make.tensor(N, K, std=K**-0.5).detach().contiguous().requires_grad_()

    inputs = {
        "x": make.data(B, L, width),
        "weight": matrix(N, K),
        "bias": make.tensor(N, std=0.3) if case.extras.bias else None,
        "residual": make.data(B, L, width) if case.extras.residual else None,
        "norm_weight": make.tensor(width, mean=1.0, std=0.3) if is_norm else None,
        "norm_bias": make.tensor(width, std=0.3) if is_norm else None,
        **case.options,
    }
    if is_feed_forward:
        inputs["inner_weight"] = matrix(2 * K, width)
        inputs["inner_bias"] = make.tensor(2 * K, std=0.3) if case.extras.bias else None
    if case.extras.delayed:
        slots = SLOTS * (1 + is_feed_forward)
        # Each slot has a scale of its own, so that none can stand in for another.
        inverse, amax = (
            make.tensor(slots, dtype=float32, mean=mean, std=0.0).detach()
            for mean in (INVERSE, 0.0)
        )
        inverse += arange(slots, device=inverse.device) * INVERSE / 8
        inputs["scales"] = Scales(inverse, amax)
    return inputs


def _work(case: Case, dtype: dtype) -> Work:
    """The bytes of the sweeps of `quantise` and of the three matmuls that read what these wrote.

    Every operand of a matmul is written in FP8 twice, as it is and transposed: one byte a number
    each. The matmul of the forward pass reads one copy, those of the backward pass the other.
    """
    B, L, K, N = case.sizes("B", "L", "K", "N")
    M, wide, producer = B * L, dtype.itemsize, case.options["producer"]
    options = {"wide": wide, "sweeps": 1 if case.extras.delayed else 2}
    # A residual is read once, and the sum written once; so are their gradients.
    added = M * _width(case) * wide * 2 if case.extras.residual else 0
    if producer != "feed_forward":
        sources = M * _width(case) * wide
        forward, backward = _layer_bytes(M, K, N, sources, **options)
        backward += {"none": 0, "geglu": 2 * sources, "layer_norm": sources}[producer]
        return Work(2.0 * M * N * K, forward + added, backward + added)
    C, sources = _width(case), M * _width(case) * wide
    inner, outer = (
        _layer_bytes(M, C, 2 * K, sources, **options),
        _layer_bytes(M, K, N, 2 * M * K * wide, **options),
    )
    # GEGLU's gradient is written in FP8 alone. Where the inner layer would sweep over it, its
    # kernel reads as many bytes of GEGLU's input, and the gradient of the outer layer's input.
    backward = inner[1] + outer[1] + M * K * wide + sources
    return Work(2.0 * M * K * (2 * C + N), inner[0] + outer[0] + added, backward + added)


def _layer_bytes(M: int, K: int, N: int, sources: int, wide: int, sweeps: int) -> tuple[int, int]:
    """Bytes of a layer's forward and backward pass, without its producer's gradient.

    Forward sweeps over the producer's `sources` bytes and over the weight, writes both copies of
    each, then multiplies. Backward sweeps over the gradient, writes and reads both its copies,
    reads the other copies of x and weight, and writes the two gradients.
    """
    operands, results = 2 * (M * K + N * K), M * N * wide
    forward = sweeps * (sources + N * K * wide) + operands + M * K + N * K + results
    backward = sweeps * results + 4 * M * N + M * K + N * K + M * K * wide + N * K * wide
    return forward, backward


def _refuses_delayed(case: Case, dtype: dtype) -> Reason | None:
    takes = "takes no delayed scales of a call, its layers keep theirs"
    return Reason("case", takes, takes) if case.extras.delayed else None


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
            refuses=_refuses_delayed,
        ),
        Backend("reference", f"{__name__}.reference"),
    ),
    cases=(
        *counted(_calls(), _case),
        *(_alternative(call) for call in dict.fromkeys(_delayed_calls())),
    ),
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
        _small("delayed", 77, 128, 96, delayed=True),
        _small("delayed after GEGLU", 40, 64, 48, "geglu", delayed=True),
        _small("delayed after LayerNorm", 50, 320, 64, "layer_norm", residual=True, delayed=True),
        _small("delayed feed-forward", 150, 320, 80, "feed_forward", residual=True, delayed=True),
        _small("delayed, no bias", 21, 64, 48, "feed_forward", bias=False, delayed=True),
    ),
    inputs=_inputs,
    work=_work,
    family="linear",
    outputs=("y", "summed"),
    dtypes=(bfloat16, float16),
)
