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

import torch
import torch.nn.functional as F

from sd_kernels.errors import require, require_convolution


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


def interleave(parities: torch.Tensor) -> torch.Tensor:
    """The pixels of each parity of (B, 4 * K, H + 1, W + 1) at their places in (B, K, 2H, 2W)."""
    B, channels, H, W = (
        parities.shape[0],
        parities.shape[1] // 4,
        parities.shape[2] - 1,
        parities.shape[3] - 1,
    )
    four = parities.unflatten(1, (2, 2, channels))
    rows = [
        torch.stack([four[:, a, c, :, a : a + H, c : c + W] for c in (0, 1)], dim=-1)
        for a in (0, 1)
    ]
    y = torch.stack(rows, dim=3).reshape(B, channels, 2 * H, 2 * W)
    return y.contiguous(memory_format=torch.channels_last)


def upsample_conv(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """See `reference.upsample_conv`; x, weight and result are dense in channels-last memory."""
    check(x, weight)
    return interleave(F.conv2d(x, merge(weight).to(x.dtype), padding=1))
