"""The 1x1 convolution beside a residual block, over one source or two.

Two sources are never concatenated.
"""

from __future__ import annotations

from typing import Any

import torch

from sd_kernels.sd_v2_shapes import BATCH, SD_V2, Architecture, ResBlock, res_blocks
from sd_kernels.spec import Backend, Case, Draw, Inputs, Matmuls, OpSpec, Work, counted


def _calls(unet: Architecture) -> list[ResBlock]:
    return [layer for layer in res_blocks(unet) if layer.sources != (layer.channels,)]


def _case(layer: ResBlock) -> Case:
    name = f"{layer.side}x{layer.side}x{'+'.join(map(str, layer.sources))} to {layer.channels}"
    return _make(name, BATCH, layer.side, layer.side, layer.sources, layer.channels)


def _make(name: str, B: int, H: int, W: int, sources: tuple[int, ...], K: int, **draw: Any) -> Case:
    shape = {"B": B, "H": H, "W": W, "C1": sources[0], "C2": sum(sources[1:]), "K": K}
    return Case(name, shape, draw=Draw(**draw))


def _inputs(case: Case, make: Inputs) -> dict[str, Any]:
    B, H, W, C1, C2, K = case.sizes("B", "H", "W", "C1", "C2", "K")
    skip = make.image(B, C2, H, W) if C2 else None
    return {"x": make.image(B, C1, H, W), "weight": make.kernel(K, C1 + C2, 1), "skip": skip}


def _matmuls(case: Case) -> Matmuls:
    B, H, W, C1, C2, K = case.sizes("B", "H", "W", "C1", "C2", "K")
    return Matmuls(rows=B * H * W, columns=K, channels=C1 + C2)


def _work(case: Case, dtype: torch.dtype) -> Work:
    B, H, W, C1, C2, K = case.sizes("B", "H", "W", "C1", "C2", "K")
    x, weight, y = B * H * W * (C1 + C2), K * (C1 + C2), B * H * W * K
    return Work(
        2.0 * x * K, (x + weight + y) * dtype.itemsize, (2 * x + 2 * weight + y) * dtype.itemsize
    )


SPEC = OpSpec(
    name="skip_conv",
    summary="1x1 convolution over one or two sources",
    backends=(
        Backend("cublas", f"{__name__}.cublas"),
        Backend("reference", f"{__name__}.reference"),
    ),
    cases=counted(_calls(SD_V2), _case),
    cases_of=lambda unet: counted(_calls(unet), _case),
    small_cases=(
        _make("tiny", 1, 2, 1, (2, 3), 2),
        _make("two sources", 2, 3, 5, (320, 640), 320),
        _make("one source", 2, 4, 3, (320,), 640),
        _make("shifted mean", 2, 4, 4, (64, 64), 96, mean=-2.3, std=0.5),
        _make("one pixel", 1, 1, 1, (1280, 1280), 32),
        _make("pixels apart", 3, 4, 6, (64, 48), 33, padding=16),
    ),
    inputs=_inputs,
    work=_work,
    family="convolutions",
    matmuls=_matmuls,
)
