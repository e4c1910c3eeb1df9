"""A linear layer on FP8 matrix units in plain torch: what is rounded, where, and with which scale.

Shape letters: M rows, K columns in, N columns out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from sd_kernels.geglu.reference import geglu

FORMATS = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
"""largest finite number of the format of values and weights, and of that of gradients"""
FORWARD, GRADIENT = FORMATS


def quantise(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x rounded to FP8 after a scale that takes its largest magnitude to the format's, and what
    undoes the scale.

    Current scaling of Micikevicius et al., "FP8 Formats for Deep Learning" (2022).
    """
    amax = x.detach().abs().amax().float()
    inverse = torch.where(amax > 0, amax / FORMATS[dtype], 1.0)
    return (x.float() / inverse).clamp(-FORMATS[dtype], FORMATS[dtype]).to(dtype), inverse


def _multiplied(
    a: tuple[torch.Tensor, torch.Tensor], b: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    return (a[0].float() @ b[0].float()) * (a[1] * b[1])


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        (values, scale), (weights, weight_scale) = quantise(x, FORWARD), quantise(weight, FORWARD)
        ctx.save_for_backward(values, scale, weights, weight_scale)
        return _multiplied((values, scale), (weights.t(), weight_scale))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        values, scale, weights, weight_scale = ctx.saved_tensors
        grad, grad_scale = quantise(grads[0], GRADIENT)
        dx = _multiplied((grad, grad_scale), (weights, weight_scale))
        return dx, _multiplied((grad.t(), grad_scale), (values, scale))


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
    """produced(x) weight^T + bias; the product's operands, and those of its gradients, are rounded
    to FP8.

    `producer` is what stands before the linear layer: "none"; "geglu", of x (..., 2K); or
    "layer_norm", of the sum x + residual over K columns, which is returned beside the result.
    weight (N, K), result (..., N). What is produced is not rounded before FP8; in float64 nothing
    is rounded at all.
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
    product = F.linear(rows, weights) if exact else _Rounded.apply(rows, weights)
    y = (product if bias is None else product + _wide(bias)).to(x.dtype).view(*x.shape[:-1], -1)
    return (y, summed) if producer == "layer_norm" else y
