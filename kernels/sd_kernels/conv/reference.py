"""A convolution without bias in plain torch.

Shape letters: B samples, C channels, K output channels, H and W rows and columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def conv(
    x: torch.Tensor, weight: torch.Tensor, *, stride: int = 1, padding: int = 1
) -> torch.Tensor:
    """x (B, C, H, W) convolved with weight (K, C, h, w), zeros beyond the borders, any dtype."""
    return F.conv2d(x, weight, stride=stride, padding=padding)
