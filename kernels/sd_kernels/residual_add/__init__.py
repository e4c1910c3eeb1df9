"""A residual sum that no norm follows.

There is one before a resampling convolution, and one at the end of a feed-forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from sd_kernels.sd_v2_shapes import (
    BATCH,
    SD_V2,
    Architecture,
    Resample,
    layers,
    transformers,
)
from sd_kernels.spec import Backend, Case, Draw, Inputs, OpSpec, Work, counted


@dataclass(frozen=True)
class Extras:
    """Whether x is an image (B, C, S, S), not tokens (B, S^2, C), and whether there is a bias."""

    image: bool
    bias: bool


class _Call(NamedTuple):
    side: int
    channels: int
    image: bool
    bias: bool


def _case(call: _Call) -> Case:
    side, channels, is_image, bias = call
    name = f"{side} x {side} x {channels}" if is_image else f"{side**2} tokens, {channels}"
    name += ", bias" if bias else ""
    extras = Extras(image=is_image, bias=bias)
    return Case(name, {"B": BATCH, "S": side, "C": channels}, extras=extras)


def _calls(unet: Architecture) -> list[_Call]:
    """Sums before a resampling also add the bias of the block before them."""
    images = [
        _Call(layer.side, layer.channels, image=True, bias=True)
        for layer in layers(unet)
        if isinstance(layer, Resample)
    ]
    tokens = [
        _Call(layer.side, layer.channels, image=False, bias=False) for layer in transformers(unet)
    ]
    return images + tokens


def _small(
    name: str,
    batch: int,
    side: int,
    channels: int,
    image: bool = True,
    bias: bool = True,
    **draw: Any,
) -> Case:
    shape = {"B": batch, "S": side, "C": channels}
    return Case(name, shape, draw=Draw(**draw), extras=Extras(image=image, bias=bias))


def _inputs(case: Case, make: Inputs) -> dict[str, Any]:
    batch, side, channels = case.sizes("B", "S", "C")
    shape = (batch, channels, side, side) if case.extras.image else (batch, side**2, channels)
    draw = make.image if case.extras.image else make.data
    inputs = {"x": draw(*shape), "residual": draw(*shape)}
    return inputs | ({"bias": make.tensor(channels)} if case.extras.bias else {})


def _work(case: Case, dtype: torch.dtype) -> Work:
    """Backward returns the gradient that it gets, and reads it for the bias's gradient alone."""
    B, S, C = case.sizes("B", "S", "C")
    size = B * S**2 * C * dtype.itemsize
    return Work(0.0, 3 * size, size if case.extras.bias else 0)


def _saved_bytes(case: Case, dtype: torch.dtype) -> int:
    """The sum, which the next layer reads."""
    B, S, C = case.sizes("B", "S", "C")
    return B * S**2 * C * dtype.itemsize


SPEC = OpSpec(
    name="residual_add",
    summary="x + residual + bias",
    backends=(
        Backend("triton", f"{__name__}.triton", ours=True, capability=(8, 0)),
        Backend("reference", f"{__name__}.reference"),
    ),
    cases=counted(_calls(SD_V2), _case),
    cases_of=lambda unet: counted(_calls(unet), _case),
    small_cases=(
        _small("tiny", 2, 2, 5),
        _small("two stages of sums", 3, 15, 320, mean=-2.3, std=0.5),
        _small("one pixel", 1, 1, 2560),
        _small("tokens, ragged", 3, 5, 333, image=False),
        _small("pixels apart", 2, 3, 640, padding=16),
        _small("no bias", 2, 3, 64, bias=False),
    ),
    inputs=_inputs,
    work=_work,
    family="sums, copies, casts",
    saved_bytes=_saved_bytes,
)
