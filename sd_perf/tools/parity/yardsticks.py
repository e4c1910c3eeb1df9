"""The plain network as torch computes it on a CPU and by cuDNN, and with FP8 where configured.

The error of the fast network may be at most twice the worst error of these.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from sd_kernels.fp8_linear.reference import fp8_linear
from sd_perf.config import PrecisionConfig
from sd_perf.tools.parity.parity_case import ParityCase

_LINEAR_LAYERS = {
    "attn2.to_k": "text",
    "attn2.to_v": "text",
    "attn": "attention",
    ".ff.": "feed_forward",
    "proj_in": "transformer_ends",
    "proj_out": "transformer_ends",
}
"""classes of linear layers in the section `precision`, by a part of the layer's name; the first
that fits"""


def plain_torch_networks(case: ParityCase, dtype: str) -> Iterator[torch.nn.Module]:
    """The case's plain network twice, in float32: as a CPU computes it, and as cuDNN does.

    A CPU computes convolutions in NCHW, with the bias. cuDNN computes them in channels-last and
    adds the bias to a result that is already rounded. At bfloat16 (by autocast), linear layers that
    the config multiplies in FP8 round their operands to FP8 here, too. One network exists at a
    time, unless the caller keeps them.
    """
    for like_cudnn in (False, True):
        unet = case.plain_network()
        if like_cudnn:
            _compute_as_cudnn(unet)
        if dtype == "bfloat16":
            round_to_fp8(unet, case.config.precision)
        yield unet


def _compute_as_cudnn(unet: torch.nn.Module) -> None:
    unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for layer in unet.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.forward = partial(_bias_added_last, layer)  # type: ignore[method-assign]


def _bias_added_last(layer: Any, x: torch.Tensor) -> torch.Tensor:
    y = F.conv2d(x, layer.weight, None, layer.stride, layer.padding)
    return y + layer.bias[:, None, None].to(y.dtype)


def round_to_fp8(unet: torch.nn.Module, precision: PrecisionConfig) -> None:
    """Replace, in place, the linear layers that `precision` has in FP8 by the FP8 reference."""
    for name, layer in unet.named_modules():
        classes = (layers for part, layers in _LINEAR_LAYERS.items() if part in name)
        layers = next(classes, None) if isinstance(layer, torch.nn.Linear) else None
        if layers and precision.of(layers) != "bf16":
            layer.forward = partial(_fp8_reference, layer)


def _fp8_reference(layer: Any, x: torch.Tensor) -> Any:
    bias = None if layer.bias is None else layer.bias.bfloat16()
    return fp8_linear(x.bfloat16(), layer.weight.bfloat16(), bias)
