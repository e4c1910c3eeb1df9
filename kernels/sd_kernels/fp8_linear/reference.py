"""A linear layer with FP8 operands in plain torch: what is rounded, where, and with which scale.

Shape letters: M rows, K columns in, N columns out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from sd_kernels.geglu.reference import geglu

FORMATS = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
"""largest finite number of each format: of values and weights, and of gradients"""
FORWARD, GRADIENT = FORMATS


def quantise(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x in FP8, scaled so that its largest magnitude becomes the format's, and the inverse scale.

    The inverse scale is () float32. This is current scaling: the scale is the tensor's own. For the
    formats see Micikevicius et al., "FP8 Formats for Deep Learning" (2022).
    """
    amax = x.detach().abs().amax().float()
    inverse = torch.where(amax > 0, amax / FORMATS[dtype], 1.0)
    return (x.float() / inverse).clamp(-FORMATS[dtype], FORMATS[dtype]).to(dtype), inverse


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
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        (values, scale), (weights, weight_scale) = quantise(x, FORWARD), quantise(weight, FORWARD)
        ctx.save_for_backward(values, scale, weights, weight_scale)
        return _multiplied((values, scale), (weights.t(), weight_scale))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        values, scale, weights, weight_scale = ctx.saved_tensors
        grad, grad_scale = quantise(grads[0], GRADIENT)
        needs_x, needs_weight = ctx.needs_input_grad
        dx = _multiplied((grad, grad_scale), (weights, weight_scale)) if needs_x else None
        dweight = _multiplied((grad.t(), grad_scale), (values, scale)) if needs_weight else None
        return dx, dweight


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
    """A linear layer (..., N) after `producer`, with FP8 operands in all three matmuls.

    weight is (N, K), bias (N,). `producer` is what comes before the linear layer:

    - "none": x is (..., K)
    - "geglu": x is (..., 2K)
    - "layer_norm": x and residual are (..., K), norm_weight and norm_bias (K,); the sum
      x + residual is normalised, and is returned as the second of two results

    The output of the producer is rounded to FP8 only, not to the dtype of x first. In float64
    nothing is rounded at all.
    """
    exact = x.dtype == torch.float64
    summed = x if residual is None else x + residual
    produced = _wide(summed)
    if norm_weight is not None and norm_bias is not None:
        produced = F.layer_norm(
            produced, produced.shape[-1:], _wide(norm_weight), _wide(norm_bias), eps
        )
    elif producer == "geglu":
        produced = geglu(produced)
    rows, weights = produced.reshape(-1, weight.shape[1]), _wide(weight)
    y = F.linear(rows, weights) if exact else _Rounded.apply(rows, weights)
    y = (y if bias is None else y + _wide(bias)).to(x.dtype).view(*x.shape[:-1], -1)
    return (y, summed) if producer == "layer_norm" else y
