"""Group normalisation by Apex's NHWC kernels (apex.contrib.group_norm, commit 6424da3b, July 2026).

Apex's module silently gives inputs that its kernels do not take to torch. This adapter calls the
registered op, and raises KernelError for such inputs. The additions before the norm and the
concatenation are passes of torch. Never run on hardware by this project.

Shape letters: see `reference`.
"""

from __future__ import annotations

import apex.contrib.group_norm  # noqa: F401  registers torch.ops.apex.group_norm_nhwc_fprop
import torch

from sd_kernels.errors import require
from sd_kernels.group_norm.apex_limits import refusal
from sd_kernels.group_norm.checks import check
from sd_kernels.group_norm.reference import prologue, returned


def group_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
    *,
    num_groups: int,
    eps: float,
    silu: bool = False,
    return_sum: int = 0,
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """See `reference.group_norm`; the concatenated sum must be dense in channels-last memory."""
    check(x, weight, bias, shift, residual, skip, num_groups)
    summed = prologue(x, shift, residual)
    source = summed if skip is None else torch.cat((summed, skip), dim=1)
    why = refusal(source.shape[1], num_groups, source.dtype)
    require(not why, "group_norm/apex", why, "what Apex's kernels compute; choose triton")
    # Our kernels read pixels that are apart; for Apex's C++ code they are an error.
    is_dense = source.is_contiguous(memory_format=torch.channels_last)
    strides = f"an image of shape {tuple(source.shape)} with strides {source.stride()}"
    require(is_dense, "group_norm/apex", strides, "dense channels-last memory")
    # As Apex's module chooses: one pass for images of up to 1,024 pixels, from capability 8.0 on.
    passes = 2 if source.shape[2] * source.shape[3] > 1024 else 1
    act = "silu" if silu else ""
    y, _ = torch.ops.apex.group_norm_nhwc_fprop(
        source, num_groups, weight, bias, eps, act, passes, False
    )
    return returned(y, source, return_sum)
