"""The FP8 linear layer: Triton kernels round the operands, torch's scaled matmul multiplies them.

Values and weights are E4M3, gradients E5M2, and sums float32. torch._scaled_mm runs on a CPU too.

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


def _matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    scales: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
    bias: torch.Tensor | None = None,
    fast: bool = False,
) -> torch.Tensor:
    """a (I, J) times b (L, J) transposed, plus bias (L,), in `dtype`; `scales` are inverse scales.

    J must be the contiguous axis of both: Hopper's matrix units take FP8 in no other order.
    """
    # While launches are recorded there is nothing to multiply.
    if is_recording():
        return a.new_empty((a.shape[0], b.shape[0]), dtype=dtype)
    scale_a, scale_b = scales
    return torch._scaled_mm(
        a, b.t(), scale_a, scale_b, bias=bias, out_dtype=dtype, use_fast_accum=fast
    )


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
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        # What the gradient of the producer reads; the FP8 operands are kept in any case.
        kept: tuple[Any, ...] = (x,) if producer == "geglu" else ()
        summed, mean, rstd, amax = x, None, None, None
        if producer == "layer_norm":
            added, mean, rstd, amax = layer_norm_statistics(
                x, norm_weight, norm_bias, residual, eps
            )
            summed = x if residual is None else added
            kept = summed, norm_weight, mean, rstd
        operands = summed, FORWARD, producer, mean, rstd, amax, norm_weight, norm_bias
        # The transpose is for the gradient of the weights, which sums over rows.
        numbers, transposed, scale = fp8_quantise(*operands)
        weights, weights_transposed, weight_scale = fp8_quantise(weight, FORWARD)
        ctx.save_for_backward(transposed, scale, weights_transposed, weight_scale, *kept)
        ctx.producer = producer
        # An output without a gradient gives None, not a tensor of zeros that is written and read.
        ctx.set_materialize_grads(False)
        # Forward accumulates fast: cuBLAS then leaves all sums to Hopper's FP8 matrix units, which
        # keep about 14 bits (DeepSeek-V3 Technical Report, arXiv 2412.19437, section 3.3.2).
        # Gradients span more magnitudes; for them cuBLAS moves partial sums to float32.
        y = _matmul(numbers, weights, (scale, weight_scale), x.dtype, bias, fast=True)
        return y, summed if producer == "layer_norm" else None

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        needs_x, needs_weight, needs_bias, needs_residual, *needs_norm = ctx.needs_input_grad[:6]
        if grads[0] is None:  # only the sum was used
            return grads[1], None, None, grads[1] if needs_residual else None, *[None] * 4
        transposed, scale, weights_transposed, weight_scale, *kept = ctx.saved_tensors
        grad = grads[0].contiguous()
        dx = dweight = dbias = None
        dnorm: tuple[Any, Any] = None, None
        numbers, grad_transposed, grad_scale = fp8_quantise(grad, GRADIENT)
        if needs_weight:
            dweight = _matmul(grad_transposed, transposed, (grad_scale, scale), grad.dtype)
        if needs_bias:
            dbias = column_sum(grad, grad.dtype)
        # Frozen text states need no gradient, and that matmul is as large as the forward's.
        if needs_x or needs_residual or any(needs_norm):
            dx = _matmul(numbers, weights_transposed, (grad_scale, weight_scale), grad.dtype)
            # Back through the producer; LayerNorm adds the gradient of the sum in the same pass.
            if ctx.producer == "geglu":
                dx = geglu_backward(*kept, dx)
            elif ctx.producer == "layer_norm":
                dx, dnorm = layer_norm_backward(*kept, dx, grads[1])
        return dx, dweight, dbias, dx if needs_residual else None, *dnorm, None, None


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
    rows = x.reshape(-1, width)
    residual_rows = None if residual is None else residual.reshape(-1, width)
    norm = norm_weight, norm_bias
    y, summed = _Fp8Linear.apply(rows, weight, bias, residual_rows, *norm, producer, eps)
    y = y.view(*x.shape[:-1], -1)
    return (y, summed.view(x.shape)) if is_norm else y
