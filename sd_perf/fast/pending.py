"""Sums that are not written to memory before a norm reads them.

A GroupNorm must read its input anyway. If it adds the bias and the residual while it reads, those
sums cost no pass of their own; one write of the sum serves the skips and the next residual.

Shape letters: B batch, C channels, H and W rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sd_perf.fast.ops import Ops


@dataclass(frozen=True)
class Pending:
    """The sum x (B, C, H, W) + bias + residual (B, C, H, W), not yet written to memory.

    The bias is (C,), or (B, C) where a norm follows.
    """

    x: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None

    def written(self, ops: Ops) -> Tensor:
        """The sum (B, C, H, W), for where no norm follows."""
        if self.residual is None:
            return (
                self.x if self.bias is None else self.x + self.bias[:, None, None].to(self.x.dtype)
            )
        return ops.residual_add(self.x, self.residual, self.bias)


def added(first: list[Tensor], second: list[Tensor]) -> Tensor:
    """The sums of two vectors each, one behind the other: one launch for all of them.

    They are packed before they are added, and so every vector has a gradient of its own. For
    vectors that are added first, autograd has one tensor for both, which is copied for the second.
    """
    return torch.cat([*first, *second]).view(2, -1).sum(0)


def as_tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) in channels-last memory as (B, H*W, C), without a copy."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def as_image(tokens: Tensor, like: Tensor) -> Tensor:
    """(B, H*W, C) as (B, C, H, W) in channels-last memory, without a copy."""
    return tokens.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


class Norm(nn.Module):
    """GroupNorm of a pending sum, concatenated with a skip; optionally followed by SiLU."""

    def __init__(self, groups: int, channels: int, *, eps: float, silu: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.num_groups, self.eps, self.silu = groups, eps, silu

    def forward(
        self, pending: Pending, ops: Ops, skip: Tensor | None = None, *, return_sum: int = 0
    ) -> Any:
        """The norm; with it the sum (B, C, H, W) `return_sum` times, and `skip` (B, C', H, W).

        Whoever reads the sum or the skip later should take one of these, each reader another, since
        the norm's backward pass then adds their gradients. Without both the result is a tensor.
        """
        tensors = pending.x, self.weight, self.bias, pending.bias, pending.residual, skip
        options = {"num_groups": self.num_groups, "eps": self.eps, "silu": self.silu}
        return ops.group_norm(
            *tensors, **options, return_sum=return_sum, return_skip=skip is not None
        )
