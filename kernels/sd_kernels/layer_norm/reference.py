"""Residual sum and LayerNorm in plain torch."""

from __future__ import annotations

import torch


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x + residual (..., C) over its last axis, and that sum (without a residual x
    itself), handed on.

    Ba, Kiros and Hinton, "Layer Normalization" (2016); weight and bias (C,); all of one dtype,
    statistics in float32.
    """
    summed = x if residual is None else x + residual
    wide, weight, bias = (
        t if t.dtype == torch.float64 else t.float() for t in (summed, weight, bias)
    )
    centred = wide - wide.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (centred * rstd * weight + bias).to(x.dtype), summed
