"""3x3 convolutions in channels-last memory, without bias: the norm that follows adds it."""

from __future__ import annotations

from typing import Any

import torch

from sd_kernels.sd_v2_shapes import BATCH, SD_V2, Architecture, Resample, ResBlock, layers
from sd_kernels.spec import Backend, Case, Draw, Inputs, Matmuls, OpSpec, Work, counted


def _calls(unet: Architecture) -> list[tuple[int, int, int, int]]:
    """(side, channels, output channels, stride) of every convolution, from input to output.

    Those that follow an upsampling are the op `upsample_conv`.
    """
    calls = [(unet.side, unet.in_channels, unet.stem, 1)]
    for layer in layers(unet):
        if isinstance(layer, ResBlock):
            calls.append((layer.side, sum(layer.sources), layer.channels, 1))
            calls.append((layer.side, layer.channels, layer.channels, 1))
        elif isinstance(layer, Resample) and not layer.up:
            calls.append((layer.side, layer.channels, layer.channels, 2))
    return [*calls, (unet.side, unet.widths[0], unet.out_channels, 1)]


def _case(call: tuple[int, int, int, int]) -> Case:
    side, channels, outputs, stride = call
    name = f"{side}x{side}x{channels} to {outputs}" + (", stride 2" if stride == 2 else "")
    return _make(name, BATCH, channels, side, side, outputs, stride)


def _make(name: str, B: int, C: int, H: int, W: int, K: int, stride: int = 1, **draw: Any) -> Case:
    shape = {"B": B, "C": C, "H": H, "W": W, "K": K}
    return Case(name, shape, {"stride": stride, "padding": 1}, Draw(**draw))


def _inputs(case: Case, make: Inputs) -> dict[str, Any]:
    B, C, H, W, K = case.sizes("B", "C", "H", "W", "K")
    return {"x": make.image(B, C, H, W), "weight": make.kernel(K, C, 3), **case.options}


def _pixels(case: Case) -> int:
    """Of the output."""
    B, H, W = case.sizes("B", "H", "W")
    stride = case.options["stride"]
    return B * -(-H // stride) * -(-W // stride)


def _matmuls(case: Case) -> Matmuls:
    C, K = case.sizes("C", "K")
    return Matmuls(rows=_pixels(case), columns=K, channels=C, taps=9, stride=case.options["stride"])


def _work(case: Case, dtype: torch.dtype) -> Work:
    B, C, H, W, K = case.sizes("B", "C", "H", "W", "K")
    pixels = _pixels(case)
    x, weight, y = B * C * H * W, 9 * K * C, pixels * K
    return Work(
        2.0 * pixels * weight,
        (x + weight + y) * dtype.itemsize,
        (2 * x + 2 * weight + y) * dtype.itemsize,
    )


SPEC = OpSpec(
    name="conv",
    summary="3x3 convolution in channels-last memory",
    backends=(
        Backend("cudnn", f"{__name__}.aten", capability=(8, 0)),
        Backend("reference", f"{__name__}.reference"),
    ),
    cases=counted(_calls(SD_V2), _case),
    cases_of=lambda unet: counted(_calls(unet), _case),
    small_cases=(
        _make("tiny", 1, 2, 2, 3, 3),
        _make("ragged", 3, 20, 5, 7, 33),
        _make("stride 2, odd sides", 2, 16, 7, 5, 24, stride=2),
        _make("shifted mean", 2, 64, 8, 8, 64, mean=-2.3, std=0.5),
        _make("latents to 320", 2, 4, 6, 6, 320),
        _make("320 to latents", 2, 320, 6, 6, 4),
        _make("one pixel, 2560 channels", 1, 2560, 1, 1, 32),
    ),
    inputs=_inputs,
    work=_work,
    family="convolutions",
    matmuls=_matmuls,
)
