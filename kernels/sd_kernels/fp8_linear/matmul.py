"""FP8 operands of a linear layer, and its three matmuls by torch's scaled matmul.

Values and weights are E4M3, gradients E5M2, and sums float32. torch._scaled_mm runs on a CPU too.

Shape letters: M rows, P rows padded to a multiple of 16, K columns in, N columns out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sd_kernels.column_sum import column_sum
from sd_kernels.fp8_linear.delayed_kernels import fp8_layer_norm
from sd_kernels.fp8_linear.quantise import fp8_quantise, fp8_quantise_delayed
from sd_kernels.fp8_linear.scaling import FORWARD, GRAD, GRADIENT, INPUT, WEIGHT, Scales
from sd_kernels.launch import is_recording
from sd_kernels.layer_norm.triton import layer_norm_statistics


class Operand(NamedTuple):
    """A matrix in FP8."""

    numbers: torch.Tensor
    """(M, K)"""
    transposed: torch.Tensor
    """(K, P), zero from M on: for the matmuls that sum over rows"""
    inverse: torch.Tensor
    """() float32: numbers times this are the matrix"""


def rounded_input(x: torch.Tensor, producer: str, scales: Scales | None) -> Operand:
    """x (M, K), or the GEGLU of x (M, 2K), as the input of a layer."""
    if scales is None:
        numbers, transposed, inverse = fp8_quantise(x, FORWARD, producer)
        return Operand(numbers, transposed, inverse)
    inverse, amax = scales.inverse[INPUT], scales.amax[INPUT]
    numbers, transposed, _ = fp8_quantise_delayed(x, FORWARD, inverse, amax, producer)
    return Operand(numbers, transposed, inverse)


def layer_norm_operand(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    scales: Scales | None,
) -> tuple[Operand, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The LayerNorm of x + residual (M, K) as a layer's input; the sum, mean and 1 / deviation."""
    inputs = x, weight, bias, residual, eps
    if scales is None:
        summed, mean, rstd, bits = layer_norm_statistics(*inputs)
        summed = x if residual is None else summed
        numbers, transposed, inverse = fp8_quantise(
            summed, FORWARD, "layer_norm", mean, rstd, bits, weight, bias
        )
    else:
        inverse = scales.inverse[INPUT]
        numbers, transposed, summed, mean, rstd = fp8_layer_norm(
            *inputs, inverse, scales.amax[INPUT]
        )
        summed = x if residual is None else summed
    return Operand(numbers, transposed, inverse), summed, mean, rstd


def rounded_weight(weight: torch.Tensor, scales: Scales | None) -> Operand:
    """The weight (N, K) of a layer; it is rounded anew in every forward pass.

    Its scale is delayed as the others are: a current one would take two more launches a layer, to
    clear its largest magnitude and to find it, and weights change least of all from step to step.
    """
    if scales is None:
        numbers, transposed, inverse = fp8_quantise(weight, FORWARD)
        return Operand(numbers, transposed, inverse)
    inverse, amax = scales.inverse[WEIGHT], scales.amax[WEIGHT]
    numbers, transposed, _ = fp8_quantise_delayed(weight, FORWARD, inverse, amax)
    return Operand(numbers, transposed, inverse)


def rounded_gradient(
    grad: torch.Tensor, with_bias: bool, scales: Scales | None
) -> tuple[Operand, torch.Tensor | None]:
    """The gradient (M, N) of a layer's output, and with a bias that of the bias (N,)."""
    if scales is None:
        numbers, transposed, inverse = fp8_quantise(grad, GRADIENT)
        dbias = column_sum(grad, grad.dtype) if with_bias else None
        return Operand(numbers, transposed, inverse), dbias
    inverse, amax = scales.inverse[GRAD], scales.amax[GRAD]
    numbers, transposed, sums = fp8_quantise_delayed(
        grad, GRADIENT, inverse, amax, with_sums=with_bias
    )
    dbias = column_sum(sums, grad.dtype) if with_bias else None
    return Operand(numbers, transposed, inverse), dbias


def linear(
    x: Operand, weight: Operand, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """The layer's output (M, N)."""
    # Forward accumulates fast: cuBLAS then leaves all sums to Hopper's FP8 matrix units, which keep
    # about 14 bits (DeepSeek-V3 Technical Report, arXiv 2412.19437, section 3.3.2). Gradients span
    # more magnitudes; for them cuBLAS moves partial sums to float32.
    scales = x.inverse, weight.inverse
    return _matmul(x.numbers, weight.numbers, scales, dtype, bias, fast=True)


def input_gradient(
    grad: Operand, weight_transposed: torch.Tensor, inverse: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The gradient (M, K) of the layer's input, from the weight's transpose and inverse scale."""
    return _matmul(grad.numbers, weight_transposed, (grad.inverse, inverse), dtype)


def weight_gradient(
    grad: Operand, x_transposed: torch.Tensor, inverse: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The gradient (N, K) of the layer's weight, from the input's transpose and inverse scale."""
    return _matmul(grad.transposed, x_transposed, (grad.inverse, inverse), dtype)


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
