"""A 1x1 convolution over the concatenation of its sources, in plain torch.

Shape letters: B samples, C1 and C2 channels of the sources, K of the output, H and W rows and
columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def skip_conv(
    x: torch.Tensor, weight: torch.Tensor, skip: torch.Tensor | None = None
) -> torch.Tensor:
    """Convolve x (B, C1, H, W), or x beside skip (B, C2, H, W), without bias: (B, K, H, W).

    weight is (K, C1 + C2, 1, 1); any floating dtype.
    """
    return F.conv2d(x if skip is None else torch.cat((x, skip), dim=1), weight)
