"""The number format of the linear layers in the fast UNet's transformers (config `precision`).

A layer's weights stay in the UNet under their own names and are passed with every call, so state
dicts do not depend on the format. A layer of Transformer Engine has no weights of its own. With
delayed scaling it has scales, which checkpoints keep as the precision state beside the weights.

Shape letters: K input features, N output features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sd_perf.config import PrecisionConfig
from sd_perf.fast.ops import Ops


@dataclass(frozen=True)
class LinearLayer:
    """The functions that compute a linear layer, alone or together with what makes its input."""

    linear: Callable[..., Tensor]
    """x (..., K), weight (N, K), optional bias (N,) -> (..., N)"""
    after_layer_norm: Callable[..., tuple[Tensor, Tensor]]
    """x (..., K), residual or None, the LayerNorm, weight, optional bias -> (..., N) and the sum
    x + residual that was normalised"""
    after_geglu: Callable[..., Tensor]
    """x (..., 2K), weight, optional bias -> (..., N); as `inner_bias` (2K,) the bias of the layer
    that made x, where GEGLU adds it"""
    adds_inner_bias: bool = False
    """whether `after_geglu` takes `inner_bias`; then the layer before it needs none"""
    scales: Any = None
    """the `sd_kernels.fp8_linear.te.Linear` whose scales outlive a step, where there is one"""


def separate(ops: Ops, linear: Callable[..., Tensor], scales: Any = None) -> LinearLayer:
    """LayerNorm or GEGLU first, then the matmul, each a kernel of its own."""

    def after_layer_norm(
        x: Tensor, residual: Tensor | None, norm: nn.LayerNorm, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        normal, summed = ops.layer_norm(x, norm.weight, norm.bias, residual, eps=norm.eps)
        return linear(normal, *weights), summed

    def after_geglu(x: Tensor, *weights: Tensor, inner_bias: Tensor | None = None) -> Tensor:
        return linear(ops.geglu(x, inner_bias), *weights)

    # GEGLU's backward pass has the gradient of x in registers, and sums the bias's on the way.
    return LinearLayer(linear, after_layer_norm, after_geglu, adds_inner_bias=True, scales=scales)


def fused(fp8_linear: Callable[..., Any]) -> LinearLayer:
    """The op `fp8_linear`: LayerNorm or GEGLU quantises its result to FP8 before writing it."""

    # A norm that wrote bfloat16 would be followed by a pass that reads it again to find the scale
    # and write FP8. Fused, the normalised row is written once, in FP8.
    def after_layer_norm(
        x: Tensor,
        residual: Tensor | None,
        norm: nn.LayerNorm,
        weight: Tensor,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        tensors = x, weight, bias, residual, norm.weight, norm.bias
        return fp8_linear(*tensors, producer="layer_norm", eps=norm.eps)

    return LinearLayer(fp8_linear, after_layer_norm, partial(fp8_linear, producer="geglu"))


class LinearPrecision:
    """Gives each linear layer of one UNet the functions of its configured number format."""

    def __init__(self, ops: Ops, config: PrecisionConfig) -> None:
        self.ops, self.config = ops, config

    def layer(
        self, layers: str, in_features: int, out_features: int, bias: bool = True
    ) -> LinearLayer:
        """A layer of the class `layers` (a key of the config section) with K and N features."""
        arithmetic = self.config.of(layers)
        if arithmetic == "bf16":
            return separate(self.ops, self.ops.linear)
        if arithmetic == "fp8_native":
            return fused(self.ops.fp8_linear)
        from sd_kernels.fp8_linear.te import Linear

        # Its weights are on the meta device and replaced at every call: the UNet's are used.
        recipe = self.config.fp8_recipe
        dtype, sizes = torch.bfloat16, (in_features, out_features)
        scales = Linear(*sizes, bias=bias, recipe=recipe, dtype=dtype, device="meta")
        return separate(self.ops, scales.with_weights, scales)

    def step(self) -> AbstractContextManager[None]:
        """The context of one forward pass: Transformer Engine updates its scales when it ends."""
        if not self.config.uses("fp8_te"):
            return nullcontext()
        from sd_kernels.fp8_linear.te import scaling_step

        return scaling_step(self.config.fp8_recipe)


def precision_state(unet: nn.Module) -> dict[str, Tensor]:
    """Scales and amax histories (bytes) by layer name; empty where none outlives a step."""
    layers = _layers_with_state(unet)
    if not layers:
        return {}
    from sd_kernels.fp8_linear import te

    return te.precision_state(layers)


def load_precision_state(unet: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Restore what `precision_state` returned, in place; KernelError where layers differ."""
    layers = _layers_with_state(unet)
    if layers:
        from sd_kernels.fp8_linear import te

        te.load_precision_state(layers, state)


def _layers_with_state(unet: nn.Module) -> dict[str, Any]:
    # A LinearLayer is no submodule, so that state dicts hold weights alone: look at attributes.
    return {
        f"{name}.{attribute}".lstrip("."): value.scales
        for name, module in unet.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, LinearLayer) and value.scales is not None and value.scales.has_state
    }
