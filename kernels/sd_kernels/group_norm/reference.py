"""Group normalisation in plain torch, with additions and concatenation before and SiLU after.

Shape letters: B samples, C channels (C1 of the first source), H and W rows and columns, G groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def prologue(
    x: torch.Tensor, shift: torch.Tensor | None, residual: torch.Tensor | None
) -> torch.Tensor:
    """The sum of x (B, C1, H, W), shift (B, C1) or (C1,), and residual (B, C1, H, W), if given."""
    if shift is not None:
        x = x + shift[..., None, None]
    return x if residual is None else x + residual


def returned(
    y: torch.Tensor, source: torch.Tensor, return_sum: int
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """What `group_norm` returns: y alone, or y and so many times what was normalised."""
    return (y, *(source,) * return_sum) if return_sum else y


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
    """Group normalisation of x + shift + residual beside `skip`, then weight, bias and SiLU.

    x and residual are (B, C1, H, W), shift (B, C1) or (C1,), skip (B, C - C1, H, W), weight and
    bias (C,). Returns y (B, C, H, W) in the memory order of x. Statistics are float32 at least,
    with the biased variance. Wu and He, "Group Normalization" (2018).

    What is normalised (B, C, H, W), the sum x + shift + residual beside `skip`, is returned
    `return_sum` times, 0 to 2. Whoever reads it later should take what is returned, each reader
    another: a backend may then add their gradients to its own in one pass.
    """
    summed = prologue(x, shift, residual)
    source = summed if skip is None else torch.cat((summed, skip), dim=1)
    B, C = source.shape[:2]
    wide = source if source.dtype == torch.float64 else source.float()
    statistics = torch.var_mean(wide.reshape(B, num_groups, -1), dim=-1, correction=0)
    # Repeated for each channel, not reshaped to groups: so the result keeps the memory order.
    variance, mean = (
        number.repeat_interleave(C // num_groups, 1)[:, :, None, None] for number in statistics
    )
    normalised = (wide - mean) * torch.rsqrt(variance + eps)
    y = (normalised * weight[:, None, None] + bias[:, None, None]).to(x.dtype)
    y = F.silu(y) if silu else y
    return returned(y, source, return_sum)
