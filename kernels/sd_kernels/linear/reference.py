"""A linear layer in plain torch.

Shape letters: K columns in, N columns out.
"""

from __future__ import annotations

import torch


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (..., K) times weight (N, K) transposed, plus bias (N,): (..., N)."""
    y = x @ weight.t()
    return y if bias is None else y + bias
