"""Nearest upsampling by two and a 3x3 convolution in plain torch.

Shape letters: B samples, C channels, K output channels, H and W rows and columns of the small
image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def upsample_conv(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Upsample x (B, C, H, W) by two and convolve with weight (K, C, 3, 3): (B, K, 2H, 2W).

    Padding 1, no bias, the dtype of x; the weight may be float32 beside an x of 16 bits. This is
    the module `Upsample` of Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion
    Models" (2022).
    """
    return F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight.to(x.dtype), padding=1)
