"""LayerNorm of x + residual, and that sum: the three norms of a transformer block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from sd_kernels.sd_v2_shapes import BATCH, SD_V2, Architecture, transformers
from sd_kernels.spec import Backend, Case, Draw, Inputs, OpSpec, Work, counted


@dataclass(frozen=True)
class Extras:
    """Whether a residual is added to x first, and which biases get their gradients here."""

    residual: bool
    x_bias: bool = False
    later_bias: bool = False


FIRST = Extras(residual=False, x_bias=True)
SECOND = Extras(residual=True, x_bias=True)
THIRD = Extras(residual=True, x_bias=True, later_bias=True)
"""the norms of a transformer block: the first has nothing to add, the others add an attention's
output; to the sum that the third returns, the feed-forward's output is added"""


def _case(call: tuple[Any, Extras]) -> Case:
    layer, extras = call
    name = f"{layer.side**2} tokens, {layer.channels}" + (", residual" if extras.residual else "")
    name += ", bias of x" + (" and of later" if extras.later_bias else "")
    return Case(name, {"B": BATCH, "L": layer.side**2, "C": layer.channels}, extras=extras)


def _calls(unet: Architecture) -> list[tuple[Any, Extras]]:
    return [(layer, extras) for layer in transformers(unet) for extras in (FIRST, SECOND, THIRD)]


def _small(
    name: str, rows: int, columns: int, extras: Extras = Extras(residual=True), **draw: Any
) -> Case:
    shape = {"B": 1, "L": rows, "C": columns}
    return Case(name, shape, draw=Draw(**draw), extras=extras)


def _inputs(case: Case, make: Inputs) -> dict[str, Any]:
    batch, tokens, channels = case.sizes("B", "L", "C")
    inputs = {
        "x": make.data(batch, tokens, channels),
        "weight": make.tensor(channels, mean=1.0, std=0.2),
        "bias": make.tensor(channels),
    }
    if case.extras.residual:
        inputs["residual"] = make.tensor(batch, tokens, channels)
    vectors = (name for name in ("x_bias", "later_bias") if getattr(case.extras, name))
    return inputs | {name: make.tensor(channels) for name in vectors}


def _saved_bytes(case: Case, dtype: torch.dtype) -> int:
    """The sum that is normalised, and the result, which the next layer reads."""
    B, L, C = case.sizes("B", "L", "C")
    return 2 * B * L * C * dtype.itemsize


def _work(case: Case, dtype: torch.dtype) -> Work:
    elements = case.shape["B"] * case.shape["L"] * case.shape["C"] * dtype.itemsize
    # Backward reads the sum and the gradients of both outputs, and writes one gradient.
    return Work(0.0, (4 if case.extras.residual else 2) * elements, 4 * elements)


SPEC = OpSpec(
    name="layer_norm",
    summary="x + residual and its LayerNorm",
    backends=(
        Backend("triton", f"{__name__}.triton", ours=True, capability=(8, 0)),
        Backend("torch", f"{__name__}.aten", yardstick=True),
        Backend("reference", f"{__name__}.reference"),
    ),
    cases=counted(_calls(SD_V2), _case),
    cases_of=lambda unet: counted(_calls(unet), _case),
    small_cases=(
        _small("tiny", 3, 5),
        _small("no residual", 37, 320, FIRST),
        _small("shifted mean", 150, 320, mean=-2.3, std=0.5),
        _small("ragged", 37, 333, THIRD),
        _small("one row", 1, 1280, THIRD),
        _small("wide", 3, 2560, SECOND),
        _small("rows apart", 19, 640, padding=16),
        _small("rows apart, no residual", 9, 1280, Extras(residual=False), padding=8),
    ),
    inputs=_inputs,
    work=_work,
    family="norms",
    saved_bytes=_saved_bytes,
    outputs=("y", "summed"),
)
