"""Nearest upsampling by two and a 3x3 convolution, as one 2x2 convolution of the small image."""

from __future__ import annotations

from typing import Any

import torch

from sd_kernels.sd_v2_shapes import BATCH, SD_V2, Architecture, Resample, layers
from sd_kernels.spec import Backend, Case, Draw, Inputs, Matmuls, OpSpec, Work, counted


def _calls(unet: Architecture) -> list[Resample]:
    return [layer for layer in layers(unet) if isinstance(layer, Resample) and layer.up]


def _case(layer: Resample) -> Case:
    side, channels = layer.side, layer.channels
    return _make(
        f"{side}x{side}x{channels} to {2 * side}x{2 * side}", BATCH, channels, side, side, channels
    )


def _make(name: str, B: int, C: int, H: int, W: int, K: int, **draw: Any) -> Case:
    return Case(name, {"B": B, "C": C, "H": H, "W": W, "K": K}, draw=Draw(**draw))


def _inputs(case: Case, make: Inputs) -> dict[str, Any]:
    B, C, H, W, K = case.sizes("B", "C", "H", "W", "K")
    return {"x": make.image(B, C, H, W), "weight": make.kernel(K, C, 3)}


def _matmuls(case: Case) -> Matmuls:
    """The merged form's: a 2x2 convolution at every corner of a pixel, four outputs for one."""
    B, C, H, W, K = case.sizes("B", "C", "H", "W", "K")
    return Matmuls(rows=B * (H + 1) * (W + 1), columns=4 * K, channels=C, taps=4)


def _work(case: Case, dtype: torch.dtype) -> Work:
    """FLOPs of the merged form.

    The plain form has 2 * B * 4HW * K * 9C, which is 1.8 to 2.1 times as many at the benchmark's
    sizes.
    """
    B, C, H, W, K = case.sizes("B", "C", "H", "W", "K")
    x, weight, y = B * C * H * W, 9 * K * C, 4 * B * H * W * K
    flops = 2.0 * B * (H + 1) * (W + 1) * 4 * K * 4 * C
    return Work(flops, (x + weight + y) * dtype.itemsize, (2 * x + 2 * weight + y) * dtype.itemsize)


SPEC = OpSpec(
    name="upsample_conv",
    summary="nearest upsampling by two, then a 3x3 convolution",
    backends=(
        Backend("triton", f"{__name__}.triton", ours=True, capability=(8, 0)),
        Backend("merged", f"{__name__}.merged"),
        Backend("reference", f"{__name__}.reference"),
    ),
    cases=counted(_calls(SD_V2), _case),
    cases_of=lambda unet: counted(_calls(unet), _case),
    small_cases=(
        _make("tiny", 1, 4, 2, 3, 5),
        _make("ragged", 3, 20, 5, 7, 33),
        _make("shifted mean", 2, 64, 4, 4, 64, mean=-2.3, std=0.5),
        _make("one row, 320 channels", 2, 320, 1, 4, 48),
        _make("one pixel, 2560 channels", 4, 2560, 1, 1, 8),
        _make("to 320 channels", 1, 16, 2, 2, 320),
    ),
    inputs=_inputs,
    work=_work,
    family="convolutions",
    matmuls=_matmuls,
)
