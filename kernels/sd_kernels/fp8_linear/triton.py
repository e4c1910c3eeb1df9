"""The linear layer by torch's scaled matrix product, on operands that `quantise` rounded; runs on a
CPU too.

Values and weights are E4M3, gradients E5M2; sums are in float32, forward with the matrix units'
fast accumulation.

Shape letters: M rows, P rows padded to a multiple of 16, K columns in, N columns out.
"""

from __future__ import annotations

from typing import Any

import torch

from sd_kernels.column_sum import column_sum
from sd_kernels.errors import require
from sd_kernels.fp8_linear.checks import check
from sd_kernels.fp8_linear.quantise import fp8_quantise
from sd_kernels.fp8_linear.reference import FORWARD, GRADIENT
from sd_kernels.geglu.triton import geglu_backward
from sd_kernels.launch import is_recording
from sd_kernels.layer_norm.triton import layer_norm_backward, layer_norm_statistics


def _product(
    a: torch.Tensor,
    b: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    fast: bool = False,
) -> torch.Tensor:
    """a (I, J) times b (L, J) transposed, both with J contiguous, plus bias (L,)."""
    if is_recording():
        return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)
    scale_a, scale_b = scales
    return torch._scaled_mm(
        a, b.t(), scale_a, scale_b, bias=bias, out_dtype=dtype, use_fast_accum=fast
    )


class _Fp8Linear(torch.autograd.Function):
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
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        kept: tuple[Any, ...] = (x,) if producer == "geglu" else ()
        summed, mean, rstd, amax = x, None, None, None
        if producer == "layer_norm":
            added, mean, rstd, amax = layer_norm_statistics(
                x, norm_weight, norm_bias, residual, eps
            )
            summed = x if residual is None else added
            kept = summed, norm_weight, mean, rstd
        operands = summed, FORWARD, producer, mean, rstd, amax, norm_weight, norm_bias
        numbers, transposed, scale = fp8_quantise(*operands)
        weights, weights_transposed, weight_scale = fp8_quantise(weight, FORWARD)
        ctx.save_for_backward(transposed, scale, weights_transposed, weight_scale, *kept)
        ctx.producer, ctx.has_bias, ctx.has_residual = (
            producer,
            bias is not None,
            residual is not None,
        )
        # A gradient that is not there is None, not zeros that are written and read.
        ctx.set_materialize_grads(False)
        y = _product(numbers, weights, (scale, weight_scale), x.dtype, bias, fast=True)
        return y, summed if producer == "layer_norm" else None

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        if grads[0] is None:  # nothing but the sum was used
            return (
                grads[1],
                None,
                None,
                grads[1] if ctx.has_residual else None,
                None,
                None,
                None,
                None,
            )
        transposed, scale, weights_transposed, weight_scale, *kept = ctx.saved_tensors
        grad = grads[0].contiguous()
        numbers, grad_transposed, grad_scale = fp8_quantise(grad, GRADIENT)
        dx = _product(numbers, weights_transposed, (grad_scale, weight_scale), grad.dtype)
        dweight = _product(grad_transposed, transposed, (grad_scale, scale), grad.dtype)
        dbias = column_sum(grad, grad.dtype) if ctx.has_bias else None
        dnorm: tuple[Any, Any] = None, None
        if ctx.producer == "geglu":
            dx = geglu_backward(*kept, dx)
        elif ctx.producer == "layer_norm":
            dx, dnorm = layer_norm_backward(*kept, dx, grads[1])
        return dx, dweight, dbias, dx if ctx.has_residual else None, *dnorm, None, None


def fp8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    *,
    producer: str = "none",
    eps: float = 1e-5,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """See `reference.fp8_linear`; bfloat16 or float16, K and N multiples of 16."""
    check(x, weight, bias, residual, norm_weight, norm_bias, producer)
    require(x.dtype != torch.float32, "fp8_linear", str(x.dtype), "bfloat16 or float16")
    is_norm, width = producer == "layer_norm", x.shape[-1]
    rows, added = (None if part is None else part.reshape(-1, width) for part in (x, residual))
    y, summed = _Fp8Linear.apply(rows, weight, bias, added, norm_weight, norm_bias, producer, eps)
    y = y.view(*x.shape[:-1], -1)
    return (y, summed.view(x.shape)) if is_norm else y
