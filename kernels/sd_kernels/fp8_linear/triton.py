"""The FP8 linear layer: Triton kernels round the operands, torch's scaled matmul multiplies them.

Shape letters: M rows, K columns in, N columns out.
"""

from __future__ import annotations

from typing import Any

import torch

from sd_kernels.errors import require
from sd_kernels.fp8_linear.checks import NORMED, check
from sd_kernels.fp8_linear.feed_forward import FeedForward
from sd_kernels.fp8_linear.matmul import (
    input_gradient,
    layer_norm_operand,
    linear,
    rounded_gradient,
    rounded_input,
    rounded_weight,
    weight_gradient,
)
from sd_kernels.fp8_linear.scaling import Scales
from sd_kernels.geglu.triton import geglu_backward
from sd_kernels.layer_norm.triton import layer_norm_backward


class _Fp8Linear(torch.autograd.Function):
    """`fp8_linear` of rows x (M, K or 2K): y (M, N) and the sum, or None without LayerNorm."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        residual: torch.Tensor | None,
        norm_weight: torch.Tensor | None,
        norm_bias: torch.Tensor | None,
        producer: str,
        eps: float,
        scales: Scales | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # What the gradient of the producer reads; the FP8 operands are kept in any case.
        kept: tuple[Any, ...] = (x,) if producer == "geglu" else ()
        summed = None
        if norm_weight is not None and norm_bias is not None:
            values, summed, *statistics = layer_norm_operand(
                x, residual, norm_weight, norm_bias, eps, scales
            )
            kept = summed, norm_weight, *statistics
        else:
            values = rounded_input(x, producer, scales)
        weights = rounded_weight(weight, scales)
        # The transposes are for the gradients, which sum over rows and over columns out.
        ctx.save_for_backward(
            values.transposed, values.inverse, weights.transposed, weights.inverse, *kept
        )
        ctx.producer, ctx.scales = producer, scales
        # An output without a gradient gives None, not a tensor of zeros that is written and read.
        ctx.set_materialize_grads(False)
        return linear(values, weights, bias, x.dtype), summed

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        needs_x, needs_weight, needs_bias, needs_residual, *needs_norm = ctx.needs_input_grad[:6]
        if grads[0] is None:  # only the sum was used
            return grads[1], None, None, grads[1] if needs_residual else None, *[None] * 5
        transposed, scale, weights_transposed, weight_scale, *kept = ctx.saved_tensors
        dtype, dx, dweight = grads[0].dtype, None, None
        dnorm: tuple[Any, Any] = None, None
        grad, dbias = rounded_gradient(grads[0].contiguous(), needs_bias, ctx.scales)
        if needs_weight:
            dweight = weight_gradient(grad, transposed, scale, dtype)
        # Frozen text states need no gradient, and that matmul is as large as the forward's.
        if needs_x or needs_residual or any(needs_norm):
            dx = input_gradient(grad, weights_transposed, weight_scale, dtype)
            # Back through the producer; LayerNorm adds the gradient of the sum in the same pass.
            if ctx.producer == "geglu":
                dx = geglu_backward(*kept, dx)
            elif ctx.producer == "layer_norm":
                dx, dnorm = layer_norm_backward(*kept, dx, grads[1])
        return dx, dweight, dbias, dx if needs_residual else None, *dnorm, None, None, None


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
    """See `reference.fp8_linear`; bfloat16 or float16, all widths multiples of 16.

    The producer "feed_forward" takes delayed scales alone: its gain is that they are known.
    """
    norm, inner = (norm_weight, norm_bias), (inner_weight, inner_bias)
    check(x, weight, bias, residual, *norm, *inner, producer, scales)
    require(x.dtype != torch.float32, "fp8_linear", str(x.dtype), "bfloat16 or float16")
    rows = x.reshape(-1, x.shape[-1])
    residual_rows = None if residual is None else residual.reshape(-1, x.shape[-1])
    outer = rows, weight, bias, residual_rows, *norm
    if producer == "feed_forward":
        require(scales is not None, "fp8_linear/triton", "no scales", "scales for a feed-forward")
        y, summed = FeedForward.apply(*outer, *inner, eps, scales)
    else:
        y, summed = _Fp8Linear.apply(*outer, producer, eps, scales)
    y = y.view(*x.shape[:-1], -1)
    return (y, summed.view(x.shape)) if producer in NORMED else y
