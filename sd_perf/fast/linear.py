"""The number format of the linear layers in the fast UNet's transformers (config `precision`).

A layer's weights stay in the UNet under their own names and are passed with every call, so state
dicts do not depend on the format. A layer of Transformer Engine has no weights of its own. With
delayed scaling (`precision.fp8_recipe: delayed`) FP8 layers have scales, which outlive a step and
which checkpoints keep as the precision state beside the weights.

A training step with delayed scaling is: forward and backward passes, which record the largest
magnitudes (amax) of what they round; with several ranks, one all-reduce of `amax_buffer` with MAX;
`update_scales`, once. Transformer Engine's layers do the same by themselves.

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

from sd_kernels.fp8_linear.delayed_scaling import DelayedScaling
from sd_perf.config import PrecisionConfig
from sd_perf.fast.ops import Ops

DELAYED = "delayed_scaling"
"""name of the UNet's `DelayedScaling`, and prefix of its tensors in the precision state"""


@dataclass(frozen=True)
class LinearLayer:
    """The functions that compute a linear layer, alone or together with what makes its input."""

    linear: Callable[..., Tensor]
    """x (..., K), weight (N, K), optional bias (N,) -> (..., N)"""
    after_layer_norm: Callable[..., tuple[Tensor, Tensor]]
    """x (..., K), residual or None, the LayerNorm, weight, optional bias -> (..., N) and the sum
    x + residual that was normalised; as `x_bias` and `later_bias` what `left_to_norm` gives"""
    after_geglu: Callable[..., Tensor]
    """x (..., 2K), weight, optional bias -> (..., N); as `inner_bias` (2K,) the bias of the layer
    that made x, where GEGLU adds it"""
    adds_inner_bias: bool = False
    """whether `after_geglu` takes `inner_bias`; then the layer before it needs none"""
    sums_biases: bool = False
    """whether `after_layer_norm` takes `x_bias` and `later_bias`"""
    scales: Any = None
    """the `sd_kernels.fp8_linear.te.Linear` whose scales outlive a step, where there is one"""
    slots: int | None = None
    """number of its delayed scales in the UNet's `DelayedScaling`, where it has such"""

    def left_to_norm(self, bias: Tensor) -> tuple[Tensor, Tensor | None]:
        """The bias of the layer before, as that layer takes it and as `after_layer_norm` does.

        The norm's backward pass has the gradient of that layer's result in registers, and can sum
        it for the bias. Then the layer itself gets a bias that takes no gradient.
        """
        return (bias.detach(), bias) if self.sums_biases else (bias, None)


FeedForward = Callable[..., tuple[Tensor, Tensor]]
"""x (..., C), residual or None, the LayerNorm, the inner and the outer nn.Linear, `x_bias` or None
-> (..., C) and the sum x + residual, both of which the caller adds"""


def separate(ops: Ops, linear: Callable[..., Tensor], scales: Any = None) -> LinearLayer:
    """LayerNorm or GEGLU first, then the matmul, each a kernel of its own."""

    def after_layer_norm(
        x: Tensor,
        residual: Tensor | None,
        norm: nn.LayerNorm,
        *weights: Tensor,
        x_bias: Tensor | None = None,
        later_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        tensors = x, norm.weight, norm.bias, residual, x_bias, later_bias
        normal, summed = ops.layer_norm(*tensors, eps=norm.eps)
        return linear(normal, *weights), summed

    def after_geglu(x: Tensor, *weights: Tensor, inner_bias: Tensor | None = None) -> Tensor:
        return linear(ops.geglu(x, inner_bias), *weights)

    # GEGLU's backward pass has the gradient of x in registers, and sums the bias's on the way.
    fusions = {"adds_inner_bias": True, "sums_biases": True}
    return LinearLayer(linear, after_layer_norm, after_geglu, **fusions, scales=scales)


def fused(
    fp8_linear: Callable[..., Any], scaling: DelayedScaling | None = None, slots: int | None = None
) -> LinearLayer:
    """The op `fp8_linear`: LayerNorm or GEGLU quantises its result to FP8 before writing it.

    With `scaling` it takes the delayed scales of that number, without it scales are current.
    """
    # A norm that wrote bfloat16 would be followed by a pass that reads it again to find the scale
    # and write FP8. Fused, the normalised row is written once, in FP8. Partial functions, unlike
    # closures, take part in a deep copy of the UNet: the copy's layers have the copy's scales.
    call = fp8_linear
    if scaling is not None and slots is not None:
        call = partial(_with_scales, fp8_linear, scaling, slots, 1)
    after_layer_norm, after_geglu = (
        partial(_after_layer_norm, call),
        partial(call, producer="geglu"),
    )
    return LinearLayer(call, after_layer_norm, after_geglu, slots=slots)


def _with_scales(
    fp8_linear: Callable[..., Any],
    scaling: DelayedScaling,
    slots: int,
    count: int,
    *tensors: Tensor | None,
    **options: Any,
) -> Any:
    return fp8_linear(*tensors, scales=scaling.of(slots, count), **options)


def _after_layer_norm(
    call: Callable[..., Any],
    x: Tensor,
    residual: Tensor | None,
    norm: nn.LayerNorm,
    weight: Tensor,
    bias: Tensor | None = None,
    x_bias: None = None,
) -> tuple[Tensor, Tensor]:
    tensors = x, weight, bias, residual, norm.weight, norm.bias
    return call(*tensors, producer="layer_norm", eps=norm.eps)


def _fused_feed_forward(
    call: Callable[..., Any],
    x: Tensor,
    residual: Tensor | None,
    norm: nn.LayerNorm,
    inner: nn.Linear,
    outer: nn.Linear,
    x_bias: None = None,
) -> tuple[Tensor, Tensor]:
    tensors = x, outer.weight, outer.bias, residual, norm.weight, norm.bias
    inner_tensors = inner.weight, inner.bias
    return call(*tensors, *inner_tensors, producer="feed_forward", eps=norm.eps)


def _feed_forward_by_layers(
    widen: LinearLayer,
    narrow: LinearLayer,
    x: Tensor,
    residual: Tensor | None,
    norm: nn.LayerNorm,
    inner: nn.Linear,
    outer: nn.Linear,
    x_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    if widen.sums_biases and narrow.adds_inner_bias:
        # The sum's later use is in a sum with the outer layer's result, which has its gradient.
        bias, left = widen.left_to_norm(outer.bias)
        biases = {"x_bias": x_bias, "later_bias": left}
        h, summed = widen.after_layer_norm(x, residual, norm, inner.weight, **biases)
        return narrow.after_geglu(h, outer.weight, bias, inner_bias=inner.bias), summed
    h, summed = widen.after_layer_norm(x, residual, norm, inner.weight, inner.bias)
    return narrow.after_geglu(h, outer.weight, outer.bias), summed


class LinearPrecision:
    """Gives each linear layer of one UNet the functions of its configured number format."""

    def __init__(self, ops: Ops, config: PrecisionConfig) -> None:
        self.ops, self.config = ops, config
        is_delayed = config.fp8_recipe == "delayed" and config.uses("fp8_native")
        self.scaling = DelayedScaling() if is_delayed else None
        """the scales of all fp8_native layers; the UNet has it as a submodule, to be moved along"""

    def layer(
        self, layers: str, in_features: int, out_features: int, bias: bool = True
    ) -> LinearLayer:
        """A layer of the class `layers` (a key of the config section) with K and N features."""
        arithmetic = self.config.of(layers)
        if arithmetic == "bf16":
            return separate(self.ops, self.ops.linear)
        if arithmetic == "fp8_native":
            slots = None if self.scaling is None else self.scaling.add_layers(1)
            return fused(self.ops.fp8_linear, self.scaling, slots)
        from sd_kernels.fp8_linear.te import Linear

        # Its weights are on the meta device and replaced at every call: the UNet's are used.
        recipe = self.config.fp8_recipe
        dtype, sizes = torch.bfloat16, (in_features, out_features)
        scales = Linear(*sizes, bias=bias, recipe=recipe, dtype=dtype, device="meta")
        return separate(self.ops, scales.with_weights, scales)

    def feed_forward(self, widen: LinearLayer, narrow: LinearLayer) -> FeedForward:
        """LayerNorm, `widen`, GEGLU and `narrow`; the layers were made one after the other."""
        if self.scaling is None or widen.slots is None:
            return partial(_feed_forward_by_layers, widen, narrow)
        # With known scales it is one op: the gradient between the layers is written in FP8 alone.
        call = partial(_with_scales, self.ops.fp8_linear, self.scaling, widen.slots, 2)
        return partial(_fused_feed_forward, call)

    def step(self) -> AbstractContextManager[None]:
        """The context of one forward pass: Transformer Engine updates its scales when it ends."""
        if not self.config.uses("fp8_te"):
            return nullcontext()
        from sd_kernels.fp8_linear.te import scaling_step

        return scaling_step(self.config.fp8_recipe)


def amax_buffer(unet: nn.Module) -> Tensor | None:
    """The largest magnitudes of this step so far, of all fp8_native layers: (slots,) float32.

    It is the tensor that kernels write. With several ranks it is all-reduced in place with MAX
    after the last backward pass of a step, before `update_scales`. None without delayed scaling.
    """
    scaling = _scaling(unet)
    return None if scaling is None else scaling.amax


def update_scales(unet: nn.Module) -> None:
    """End a step of delayed scaling: set the next step's scales, in place and without a sync.

    To be called once a step, after the last backward pass and the reduction of `amax_buffer`, not
    once a micro-batch. It does nothing without delayed scaling by fp8_native.
    """
    scaling = _scaling(unet)
    if scaling is not None:
        scaling.update()


def precision_state(unet: nn.Module) -> dict[str, Tensor]:
    """Copies of scales and amax histories by name; empty where none outlives a step.

    Those of fp8_native are the float32 tensors of `DelayedScaling`, those of Transformer Engine are
    bytes by layer name.
    """
    state: dict[str, Tensor] = {}
    if layers := _layers_with_state(unet):
        from sd_kernels.fp8_linear import te

        state |= te.precision_state(layers)
    if (scaling := _scaling(unet)) is not None:
        state |= {f"{DELAYED}.{name}": tensor for name, tensor in scaling.state().items()}
    return state


def load_precision_state(unet: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Restore what `precision_state` returned, in place; KernelError where layers differ."""
    prefix = f"{DELAYED}."
    delayed = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
    of_layers = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    if layers := _layers_with_state(unet):
        from sd_kernels.fp8_linear import te

        te.load_precision_state(layers, of_layers)
    if (scaling := _scaling(unet)) is not None:
        scaling.load_state(delayed)


def _scaling(unet: nn.Module) -> DelayedScaling | None:
    return getattr(unet, DELAYED, None)


def _layers_with_state(unet: nn.Module) -> dict[str, Any]:
    # A LinearLayer is no submodule, so that state dicts hold weights alone: look at attributes.
    return {
        f"{name}.{attribute}".lstrip("."): value.scales
        for name, module in unet.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, LinearLayer) and value.scales is not None and value.scales.has_state
    }
