"""Residual sum and LayerNorm in plain torch.

Shape letter: C columns.
"""

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
    """LayerNorm of x + residual (..., C) over the last axis, and that sum.

    Without a residual the sum is x itself. weight and bias are (C,); all have one dtype, and
    statistics are float32 at least. Ba, Kiros and Hinton, "Layer Normalization" (2016).
    """
    summed = x if residual is None else x + residual
    wide, weight, bias = (
        t if t.dtype == torch.float64 else t.float() for t in (summed, weight, bias)
    )
    centred = wide - wide.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (centred * rstd * weight + bias).to(x.dtype), summed
