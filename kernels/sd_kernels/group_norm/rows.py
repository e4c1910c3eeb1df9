"""The memory order of images that kernels and adapters take: rows of adjacent channels.

Shape letters: B samples, C channels, H and W rows and columns.
"""

from __future__ import annotations

import torch


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether channels of x (B, C, H, W) are adjacent and pixels evenly apart.

    Pixels may be more than C elements apart, as in a slice of a wider image.
    """
    _, channels, height, width = x.shape
    return (x.stride(1) == 1 or channels == 1) and (
        height == 1 or width == 1 or x.stride(2) == width * x.stride(3)
    )


def pixel_stride(x: torch.Tensor) -> int:
    """Elements from one pixel of a channels-last image to the next."""
    if x.shape[3] > 1:
        return x.stride(3)
    return x.stride(2) if x.shape[2] > 1 else x.shape[1]


def dense(x: torch.Tensor) -> torch.Tensor:
    """x itself where it is channels-last, otherwise a copy that is.

    For results of torch and for gradients, which may come in any order.
    """
    return x if is_channels_last(x) else x.contiguous(memory_format=torch.channels_last)
