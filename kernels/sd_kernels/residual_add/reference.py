"""Residual sum with bias in plain torch.

Shape letters: B samples, C channels, H and W rows and columns.
"""

from __future__ import annotations

import torch


def residual_add(
    x: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x + residual + bias (C,), for images (B, C, H, W) or tokens (..., C).

    A tensor with four axes is taken for images. Any floating dtype.
    """
    summed = x + residual
    if bias is None:
        return summed
    return summed + (bias[:, None, None] if x.dim() == 4 else bias)
