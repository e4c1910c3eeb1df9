"""How the linear layers of the fast UNet's transformers are multiplied: what the section
`precision` chooses.

A layer's weights stay in the UNet, under their names, and come with every call. A layer of
Transformer Engine has none: it keeps scales, if its recipe is delayed, which are the precision
state that checkpoints hold beside the weights.

Shape letters: K columns in, N columns out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sd_perf.config import PrecisionConfig

if TYPE_CHECKING:
    from sd_perf.fast.unet import Ops


@dataclass(frozen=True)
class Product:
    """A linear layer's product: alone, or with what makes its input."""

    linear: Callable[..., Tensor]
    """x (..., K), weight (N, K) and perhaps bias (N,) to (..., N)"""
    after_norm: Callable[..., tuple[Tensor, Tensor]]
    """x (..., K), residual or None, the LayerNorm, weight, perhaps bias to (..., N), and to the sum
    that is normed"""
    after_geglu: Callable[..., Tensor]
    """x (..., 2K), weight, perhaps bias to (..., N)"""
    layer: Any = None
    """what keeps scales between steps, `sd_kernels.fp8_linear.te.Linear`"""


def in_turn(ops: Ops, linear: Callable[..., Tensor], layer: Any = None) -> Product:
    """Norm or GEGLU, then the product."""

    def after_norm(
        x: Tensor, residual: Tensor | None, norm: nn.LayerNorm, *weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        normal, total = ops.layer_norm(x, norm.weight, norm.bias, residual, eps=norm.eps)
        return linear(normal, *weights), total

    def after_geglu(x: Tensor, *weights: Tensor) -> Tensor:
        return linear(ops.geglu(x), *weights)

    return Product(linear, after_norm, after_geglu, layer)


def fused(fp8_linear: Callable[..., Any]) -> Product:
    """The op `fp8_linear`, which rounds what norm and GEGLU make before it is written."""

    def after_norm(
        x: Tensor,
        residual: Tensor | None,
        norm: nn.LayerNorm,
        weight: Tensor,
        bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return fp8_linear(
            x, weight, bias, residual, norm.weight, norm.bias, producer="layer_norm", eps=norm.eps
        )

    return Product(fp8_linear, after_norm, partial(fp8_linear, producer="geglu"))


class Products:
    """Makes the product of each layer of one UNet."""

    def __init__(self, ops: Ops, config: PrecisionConfig) -> None:
        self.ops, self.config = ops, config

    def __call__(
        self, layers: str, in_features: int, out_features: int, bias: bool = True
    ) -> Product:
        """The product of a layer of this class, K and N features."""
        arithmetic = self.config.of(layers)
        if arithmetic == "bf16":
            return in_turn(self.ops, self.ops.linear)
        if arithmetic == "fp8_native":
            return fused(self.ops.fp8_linear)
        from sd_kernels.fp8_linear.te import Linear

        layer = Linear(
            in_features, out_features, bias, self.config.fp8_recipe, torch.bfloat16, "meta"
        )
        return in_turn(self.ops, layer.with_weights, layer)

    def step(self) -> AbstractContextManager[None]:
        """What surrounds a forward pass."""
        if not self.config.uses("fp8_te"):
            return nullcontext()
        from sd_kernels.fp8_linear.te import scaling_step

        return scaling_step(self.config.fp8_recipe)


def precision_state(unet: nn.Module) -> dict[str, Tensor]:
    """Scales and histories (bytes) by the layer's place in the UNet; empty where none outlives a
    step."""
    layers = _layers_with_state(unet)
    if not layers:
        return {}
    from sd_kernels.fp8_linear import te

    return te.precision_state(layers)


def load_precision_state(unet: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Put back what `precision_state` gave, in the memory it was in; KernelError where the layers
    differ."""
    layers = _layers_with_state(unet)
    if layers:
        from sd_kernels.fp8_linear import te

        te.load_precision_state(layers, state)


def _layers_with_state(unet: nn.Module) -> dict[str, Any]:
    return {
        f"{name}.{attribute}".lstrip("."): value.layer
        for name, module in unet.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, Product) and value.layer is not None and value.layer.has_state
    }
