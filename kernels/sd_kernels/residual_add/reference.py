"""Residual sum with bias in plain torch."""

from __future__ import annotations

import torch


def residual_add(
    x: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x + residual + bias (C,) for images (B, C, H, W) or, where there are not four axes, tokens
    (..., C)."""
    summed = x + residual
    if bias is None:
        return summed
    return summed + (bias[:, None, None] if x.dim() == 4 else bias)
