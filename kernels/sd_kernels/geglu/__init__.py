"""GEGLU: the gated activation between the two linears of a feed-forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sd_kernels.sd_v2_shapes import BATCH, transformers
from sd_kernels.spec import Backend, Case, Draw, Inputs, OpSpec, Work, counted


@dataclass(frozen=True)
class Extras:
    """Whether the bias of the linear layer before is added here."""

    bias: bool


def _case(layer: Any) -> Case:
    tokens, columns = layer.side**2, 4 * layer.channels
    shape = {"B": BATCH, "L": tokens, "N": columns}
    return Case(f"{tokens} tokens, {columns}", shape, extras=Extras(bias=True))


def _small(name: str, rows: int, columns: int, bias: bool = True, **draw: Any) -> Case:
    shape = {"B": 1, "L": rows, "N": columns}
    return Case(name, shape, draw=Draw(**draw), extras=Extras(bias))


def _inputs(case: Case, make: Inputs) -> dict[str, Any]:
    B, L, N = case.sizes("B", "L", "N")
    x = make.data(B, L, 2 * N)
    return {"x": x, "bias": make.tensor(2 * N, std=0.3) if case.extras.bias else None}


def _saved_bytes(case: Case, dtype: torch.dtype) -> int:
    """Its input, and its output, which the next layer reads."""
    B, L, N = case.sizes("B", "L", "N")
    return (2 + 1) * B * L * N * dtype.itemsize


def _work(case: Case, dtype: torch.dtype) -> Work:
    outputs = case.shape["B"] * case.shape["L"] * case.shape["N"]
    return Work(0.0, 3 * outputs * dtype.itemsize, 5 * outputs * dtype.itemsize)


SPEC = OpSpec(
    name="geglu",
    summary="value * gelu(gate), exact erf",
    backends=(
        Backend("triton", f"{__name__}.triton", ours=True, capability=(8, 0)),
        Backend("reference", f"{__name__}.reference"),
    ),
    cases=counted(transformers(), _case),
    cases_of=lambda unet: counted(transformers(unet), _case),
    small_cases=(
        _small("tiny", 2, 5),
        _small("one row", 1, 1280),
        _small("several stripes", 75, 333),
        _small("no bias", 37, 333, bias=False),
        _small("wide", 3, 2560),
        _small("rows apart", 9, 320, padding=16),
        _small("shifted mean", 20, 256, mean=-2.3, std=0.5),
        _small("large gates", 8, 256, std=6.0),
    ),
    inputs=_inputs,
    work=_work,
    family="activations",
    saved_bytes=_saved_bytes,
)
