"""A feed-forward with delayed scaling: LayerNorm, linear, GEGLU, linear, in one autograd function.

Autograd passes no gradient in FP8 from one function to another. Within one, the gradient of the
widest tensor, GEGLU's input, is written in FP8 by the kernel that computes it and never exists in
16 bits; the same kernel sums it for the inner bias.

Shape letters: M rows, C columns, K columns of GEGLU's output, N columns out.
"""

from __future__ import annotations

from typing import Any

import torch

from sd_kernels.column_sum import column_sum
from sd_kernels.fp8_linear.delayed_kernels import fp8_geglu_backward
from sd_kernels.fp8_linear.matmul import (
    Operand,
    input_gradient,
    layer_norm_operand,
    linear,
    rounded_gradient,
    rounded_input,
    rounded_weight,
    weight_gradient,
)
from sd_kernels.fp8_linear.scaling import GRAD, Scales
from sd_kernels.layer_norm.triton import layer_norm_backward


class FeedForward(torch.autograd.Function):
    """Rows x (M, C) to y (M, N) and the sum x + residual (M, C); see `reference.fp8_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        inner_weight: torch.Tensor,
        inner_bias: torch.Tensor | None,
        eps: float,
        scales: Scales,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        inner, outer = scales.layer(0), scales.layer(1)
        normal, summed, *statistics = layer_norm_operand(
            x, residual, norm_weight, norm_bias, eps, inner
        )
        inner_weights = rounded_weight(inner_weight, inner)
        gated = linear(normal, inner_weights, inner_bias, x.dtype)
        product, weights = rounded_input(gated, "geglu", outer), rounded_weight(weight, outer)
        kept = [summed, norm_weight, *statistics, gated]
        for operand in (normal, inner_weights, product, weights):
            # The gradients of weights sum over rows, those of inputs over columns out.
            kept += [operand.transposed, operand.inverse]
        ctx.save_for_backward(*kept)
        ctx.scales = scales
        # An output without a gradient gives None, not a tensor of zeros that is written and read.
        ctx.set_materialize_grads(False)
        return linear(product, weights, bias, x.dtype), summed

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        needs_x, needs_weight, needs_bias, needs_residual, *needs_norm = ctx.needs_input_grad[:6]
        needs_inner_weight, needs_inner_bias = ctx.needs_input_grad[6:8]
        needs_dx = needs_x or needs_residual or any(needs_norm)
        if grads[0] is None:  # only the sum was used
            return grads[1], None, None, grads[1] if needs_residual else None, *[None] * 6
        summed, norm_weight, mean, rstd, gated, *operands = ctx.saved_tensors
        normal, inner_weights, product, weights = zip(operands[::2], operands[1::2], strict=True)
        dtype, dx, dweight, dinner_weight, dinner_bias = gated.dtype, None, None, None, None
        dnorm: tuple[Any, Any] = None, None
        grad, dbias = rounded_gradient(grads[0].contiguous(), needs_bias, ctx.scales.layer(1))
        if needs_weight:
            dweight = weight_gradient(grad, *product, dtype)
        if needs_dx or needs_inner_weight or needs_inner_bias:
            dproduct = input_gradient(grad, *weights, dtype)
            inverse, amax = (tensor[GRAD] for tensor in ctx.scales.layer(0))
            numbers, transposed, sums = fp8_geglu_backward(
                gated, dproduct, inverse, amax, needs_inner_bias
            )
            grad = Operand(numbers, transposed, inverse)
            dinner_bias = column_sum(sums, dtype) if needs_inner_bias else None
        if needs_inner_weight:
            dinner_weight = weight_gradient(grad, *normal, dtype)
        if needs_dx:
            dnormal = input_gradient(grad, *inner_weights, dtype)
            dx, dnorm = layer_norm_backward(summed, norm_weight, mean, rstd, dnormal, grads[1])
        dresidual = dx if needs_residual else None
        return dx, dweight, dbias, dresidual, *dnorm, dinner_weight, dinner_bias, None, None
