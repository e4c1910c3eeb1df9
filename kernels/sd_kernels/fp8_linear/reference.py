"""A linear layer with FP8 operands in plain torch: what is rounded, where, and with which scale.

Shape letters: M rows, K columns in, N columns out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from sd_kernels.fp8_linear.scaling import (
    FORMATS,
    FORWARD,
    GRAD,
    GRADIENT,
    INPUT,
    WEIGHT,
    Scales,
)
from sd_kernels.geglu.reference import geglu


def quantise(
    x: torch.Tensor, dtype: torch.dtype, scales: Scales | None = None, slot: int = INPUT
) -> tuple[torch.Tensor, torch.Tensor]:
    """x in FP8 and the inverse scale () float32.

    With `scales` of a layer the scale of the slot is taken, and x's largest magnitude recorded
    there. Without, scaling is current: x's largest magnitude becomes the format's. For the formats
    see Micikevicius et al., "FP8 Formats for Deep Learning" (2022).
    """
    largest, amax = FORMATS[dtype], x.detach().abs().amax().float()
    if scales is None:
        inverse = torch.where(amax > 0, amax / largest, 1.0)
        scaled = x.float() / inverse
    else:
        scales.amax[slot].copy_(torch.maximum(scales.amax[slot], amax))
        inverse = scales.inverse[slot]
        scaled = x.float() * (1.0 / inverse)
    return scaled.clamp(-largest, largest).to(dtype), inverse


def _multiplied(
    a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """The matmul of two (numbers, inverse scale), in float32."""
    return (a[0].float() @ b[0].float()) * (a[1] * b[1])


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _Rounded(torch.autograd.Function):
    """x (M, K) times weight (N, K) transposed; values and weights in E4M3, gradients in E5M2."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, scales: Scales | None
    ) -> torch.Tensor:
        values, scale = quantise(x, FORWARD, scales, INPUT)
        weights, weight_scale = quantise(weight, FORWARD, scales, WEIGHT)
        ctx.save_for_backward(values, scale, weights, weight_scale)
        ctx.scales = scales
        return _multiplied((values, scale), (weights.t(), weight_scale))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        values, scale, weights, weight_scale = ctx.saved_tensors
        grad, grad_scale = quantise(grads[0], GRADIENT, ctx.scales, GRAD)
        needs_x, needs_weight, _ = ctx.needs_input_grad
        dx = _multiplied((grad, grad_scale), (weights, weight_scale)) if needs_x else None
        dweight = _multiplied((grad.t(), grad_scale), (values, scale)) if needs_weight else None
        return dx, dweight, None


def _linear(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    scales: Scales | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """rows (M, K) to (M, N) in `dtype`."""
    exact, weights = rows.dtype == torch.float64, _wide(weight)
    y = F.linear(rows, weights) if exact else _Rounded.apply(rows, weights, scales)
    return (y if bias is None else y + _wide(bias)).to(dtype)


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    inner_weight: torch.Tensor | None = None,
    inner_bias: torch.Tensor | None = None,
    *,
    producer: str = "none",
    eps: float = 1e-5,
    scales: Scales | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """A linear layer (..., N) after `producer`, with FP8 operands in all three matmuls.

    weight is (N, K), bias (N,). `producer` is what comes before the linear layer:

    - "none": x is (..., K)
    - "geglu": x is (..., 2K)
    - "layer_norm": x and residual are (..., K), norm_weight and norm_bias (K,); the sum
      x + residual is normalised, and is returned as the second of two results
    - "feed_forward": as "layer_norm" with width C, then a linear layer of inner_weight (2K, C) and
      inner_bias (2K,), then "geglu"

    The output of the producer is rounded to FP8 only, not to the dtype of x first. `scales` are the
    layer's delayed scales, for "feed_forward" those of the inner layer before those of the outer;
    without them scaling is current. In float64 nothing is rounded and no magnitude recorded.
    """
    summed = x if residual is None else x + residual
    produced = _wide(summed)
    if norm_weight is not None and norm_bias is not None:
        produced = F.layer_norm(
            produced, produced.shape[-1:], _wide(norm_weight), _wide(norm_bias), eps
        )
    rows, own = produced.reshape(-1, produced.shape[-1]), scales
    if inner_weight is not None:
        inner, own = (None, None) if scales is None else (scales.layer(0), scales.layer(1))
        rows = _wide(_linear(rows, inner_weight, inner_bias, inner, x.dtype))
    if producer in ("geglu", "feed_forward"):
        rows = geglu(rows)
    y = _linear(rows, weight, bias, own, x.dtype).view(*x.shape[:-1], -1)
    return (y, summed) if producer in ("layer_norm", "feed_forward") else y
