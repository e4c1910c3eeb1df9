"""Linear layers on FP8 matrix units, fused with the GEGLU or LayerNorm that makes their input."""

from __future__ import annotations

from typing import Any

from torch import bfloat16, dtype, float16

from sd_kernels.sd_v2_shapes import BATCH, Transformer, counted, transformers
from sd_kernels.spec import Backend, Case, Inputs, OpSpec, Work


def _calls() -> list[tuple[Transformer, str]]:
    return [(layer, producer) for layer in transformers() for producer in ("geglu", "layer_norm", "none")]


def _case(call: tuple[Transformer, str]) -> Case:
    """Feed-forward in (after a norm) and out (after GEGLU), and the attention's output."""
    (layer, producer), C = call, call[0].channels
    K, N = {"geglu": (4 * C, C), "layer_norm": (C, 8 * C), "none": (C, C)}[producer]
    rows = BATCH * layer.side**2
    return Case(
        f"{producer} {rows} x {K} to {N}", {"B": rows, "K": K, "N": N}, {"producer": producer}, {"residual": True}
    )


def _small(name: str, M: int, K: int, N: int, producer: str = "none", **data: Any) -> Case:
    return Case(name, {"B": M, "K": K, "N": N}, {"producer": producer}, data)


def _inputs(case: Case, make: Inputs) -> dict[str, Any]:
    (M, K, N), producer = case.shape.values(), case.options["producer"]
    is_norm = producer == "layer_norm"
    return {
        "x": make.data(M, 2 * K if producer == "geglu" else K),
        "weight": make.tensor(N, K, std=K**-0.5).detach().contiguous().requires_grad_(),
        "bias": make.tensor(N, std=0.3),
        "residual": make.data(M, K) if is_norm and case.data.get("residual") else None,
        "norm_weight": make.tensor(K, mean=1.0, std=0.3) if is_norm else None,
        "norm_bias": make.tensor(K, std=0.3) if is_norm else None,
        **case.options,
    }


def _work(case: Case, dtype: dtype) -> Work:
    """Two sweeps over what makes the operands, both copies of each operand written once and read once."""
    (M, K, N), producer, wide = case.shape.values(), case.options["producer"], dtype.itemsize
    sources = M * K * wide * (2 if producer == "geglu" else 1)
    handed = M * K * wide * 2 if case.data.get("residual") and producer == "layer_norm" else 0
    operands, results = 2 * (M * K + N * K), M * N * wide
    forward = 2 * sources + handed + 2 * N * K * wide + operands + M * K + N * K + results
    backward = 2 * results + 2 * M * N + 2 * M * N + M * K + N * K + M * K * wide + N * K * wide
    backward += {"none": 0, "geglu": 2 * sources, "layer_norm": sources + handed}[producer]
    return Work(2.0 * M * N * K, forward, backward)


SPEC = OpSpec(
    name="fp8_linear",
    summary="GEGLU or LayerNorm, rounding to FP8, linear",
    backends=(
        Backend("triton", f"{__name__}.triton", capability=(8, 9)),
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
        _small("several tiles", 150, 144, 80, "geglu"),
        _small("one row", 1, 1280, 16),
        _small("rows apart", 20, 64, 16, padding=16),
    ),
    inputs=_inputs,
    work=_work,
    outputs=("y", "sum"),
    dtypes=(bfloat16, float16),
)
