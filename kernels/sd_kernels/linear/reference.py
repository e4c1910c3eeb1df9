"""A linear layer, spelt out."""

from __future__ import annotations

import torch


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., K) times weight (N, K) transposed, plus bias (N,)."""
    y = x @ weight.t()
    return y if bias is None else y + bias
