"""The merged form in torch: a 2x2 convolution of the small image, not a 3x3 one of the large.

Row 2i + a of the result, with parity a of 0 or 1, sees the three upsampled rows from 2i + a - 1 on.
These are copies of two rows of x. For a = 0 they are rows i - 1, i, i, so that the kernel has two
rows, w0 and w1 + w2. For a = 1 they are rows i, i, i + 1, so that it has w0 + w1 and w2. Columns
are alike: each parity (a, c) has a 2x2 kernel, and there are four times as many output channels.
All four come from one convolution with padding 1. Its position u sees rows u - 1 and u, so parity a
finds its row i at u = i + a. Zeros beyond the borders stay zeros, so this is exact. It takes 4/9 of
the operations, times (1 + 1/H)(1 + 1/W) for positions that not every parity uses.

In low precision the merged weights are rounded, and so are their gradients before they are summed:
y and the gradient of the weights have sqrt(2) times the error of plain torch (measured: 1.42). dx
has no more than plain torch (0.99), where the gradient of upsampling rounds too. Weights given in
float32 are rounded once, after merging, and y then has no more error than plain torch.

Shape letters: B samples, C channels, K output channels, H and W rows and columns of the small
image.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F

from sd_kernels.errors import require, require_convolution

_PARITIES = tuple(product((0, 1), (0, 1)))


def check(x: torch.Tensor, weight: torch.Tensor) -> None:
    """Raise KernelError unless x and weight are what the op takes."""
    require_convolution("upsample_conv", x, weight, takes_wide=True)
    require(
        weight.shape[2:] == (3, 3),
        "upsample_conv",
        f"weight of shape {tuple(weight.shape)}",
        "(K, C, 3, 3)",
    )


def _merged_along(weight: torch.Tensor, axis: int) -> torch.Tensor:
    """Three taps along a (negative) axis merged to two, for both parities: (2, ...)."""
    first, second, third = weight.unbind(axis)
    even, odd = (first, second + third), (first + second, third)
    return torch.stack([torch.stack(taps, axis) for taps in (even, odd)])


def merge(weight: torch.Tensor) -> torch.Tensor:
    """Weights (K, C, 3, 3) merged to (4 * K, C, 2, 2), in the same dtype, with sums in float32.

    Parity (a, c) has the K output channels from (2a + c) * K on.
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    merged = _merged_along(_merged_along(wide, -2), -1).transpose(0, 1).flatten(0, 2)
    return merged.to(weight.dtype).contiguous(memory_format=torch.channels_last)


class _Interleave(torch.autograd.Function):
    """See `interleave`. Slices by autograd would be padded with zeros and added, one by one."""

    @staticmethod
    def forward(ctx: Any, parities: torch.Tensor) -> torch.Tensor:
        B, rows, columns, channels = parities.permute(0, 2, 3, 1).shape
        H, W, K = rows - 1, columns - 1, channels // 4
        small = parities.permute(0, 2, 3, 1).unflatten(-1, (2, 2, K))
        large = parities.new_empty(B, H, 2, W, 2, K)
        for a, c in _PARITIES:
            large[:, :, a, :, c] = small[:, a : a + H, c : c + W, a, c]
        return large.view(B, 2 * H, 2 * W, K).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
        B, K, H, W = dy.shape[0], dy.shape[1], dy.shape[2] // 2, dy.shape[3] // 2
        large = dy.permute(0, 2, 3, 1).unflatten(2, (W, 2)).unflatten(1, (H, 2))
        # Not every parity uses every position.
        small = dy.new_zeros(B, H + 1, W + 1, 2, 2, K)
        for a, c in _PARITIES:
            small[:, a : a + H, c : c + W, a, c] = large[:, :, a, :, c]
        return small.flatten(3).permute(0, 3, 1, 2)


def interleave(parities: torch.Tensor) -> torch.Tensor:
    """The pixels of each parity of (B, 4 * K, H + 1, W + 1) at their places in (B, K, 2H, 2W)."""
    return _Interleave.apply(parities)


def upsample_conv(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """See `reference.upsample_conv`; x, weight and result are dense in channels-last memory."""
    check(x, weight)
    return interleave(F.conv2d(x, merge(weight).to(x.dtype), padding=1))
