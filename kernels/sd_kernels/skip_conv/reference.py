"""A 1x1 convolution over the concatenation of its sources, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def skip_conv(
    x: torch.Tensor, weight: torch.Tensor, skip: torch.Tensor | None = None
) -> torch.Tensor:
    """x (B, C1, H, W) and `skip` (B, C2, H, W) with weight (K, C1 + C2, 1, 1), without bias: (B,
    K, H, W)."""
    return F.conv2d(x if skip is None else torch.cat((x, skip), dim=1), weight)
