"""Group normalisation by torch's own operators.

Each addition, the concatenation and SiLU is a pass of its own. Shape letters: see `reference`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sd_kernels.group_norm.checks import check
from sd_kernels.group_norm.reference import prologue, returned
from sd_kernels.group_norm.rows import dense, is_channels_last


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
    """See `reference.group_norm`."""
    check(x, weight, bias, shift, residual, skip, num_groups, double=True)
    summed = prologue(x, shift, residual)
    source = summed if skip is None else torch.cat((summed, skip), dim=1)
    y = F.group_norm(source, num_groups, weight, bias, eps)
    # On a GPU torch's kernel returns NCHW memory for any input.
    y = dense(y) if is_channels_last(source) else y
    y = F.silu(y) if silu else y
    return returned(y, source, return_sum)
