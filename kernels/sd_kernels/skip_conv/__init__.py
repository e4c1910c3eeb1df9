"""The 1x1 convolution beside a residual block."""

from __future__ import annotations

from typing import Any

import torch

from sd_kernels.sd_v2_shapes import BATCH, SD_V2, Architecture, res_blocks
from sd_kernels.spec import Backend, Case, Draw, Inputs, Matmuls, OpSpec, Work, counted


def _calls(unet: Architecture) -> list[tuple[int, int, int]]:
    """Side, channels in (those of the skip among them) and channels out."""
    return [
        (layer.side, sum(layer.sources), layer.channels)
        for layer in res_blocks(unet)
        if layer.sources != (layer.channels,)
    ]


def _case(call: tuple[int, int, int]) -> Case:
    side, C, K = call
    return _make(f"{side}x{side}x{C} to {K}", BATCH, side, side, C, K)


def _make(name: str, B: int, H: int, W: int, C: int, K: int, **draw: Any) -> Case:
    return Case(name, {"B": B, "H": H, "W": W, "C": C, "K": K}, draw=Draw(**draw))


def _inputs(case: Case, make: Inputs) -> dict[str, Any]:
    B, H, W, C, K = case.sizes("B", "H", "W", "C", "K")
    return {"x": make.image(B, C, H, W), "weight": make.kernel(K, C, 1)}


def _matmuls(case: Case) -> Matmuls:
    B, H, W, C, K = case.sizes("B", "H", "W", "C", "K")
    return Matmuls(rows=B * H * W, columns=K, channels=C)


def _work(case: Case, dtype: torch.dtype) -> Work:
    B, H, W, C, K = case.sizes("B", "H", "W", "C", "K")
    x, weight, y = B * H * W * C, K * C, B * H * W * K
    return Work(
        2.0 * x * K, (x + weight + y) * dtype.itemsize, (2 * x + 2 * weight + y) * dtype.itemsize
    )


SPEC = OpSpec(
    name="skip_conv",
    summary="1x1 convolution",
    backends=(
        Backend("cublas", f"{__name__}.cublas"),
        Backend("reference", f"{__name__}.reference"),
    ),
    cases=counted(_calls(SD_V2), _case),
    cases_of=lambda unet: counted(_calls(unet), _case),
    small_cases=(
        _make("tiny", 1, 2, 1, 5, 2),
        _make("narrower", 2, 3, 5, 960, 320),
        _make("wider", 2, 4, 3, 320, 640),
        _make("shifted mean", 2, 4, 4, 128, 96, mean=-2.3, std=0.5),
        _make("one pixel", 1, 1, 1, 2560, 32),
        _make("pixels apart", 3, 4, 6, 112, 33, padding=16),
    ),
    inputs=_inputs,
    work=_work,
    family="convolutions",
    matmuls=_matmuls,
)
