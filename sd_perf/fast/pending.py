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
    """The sum x (B, C, H, W) + bias (C,) + residual (B, C, H, W), not yet written to memory."""

    x: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None

    @property
    def shift(self) -> Tensor | None:
        """The bias as a norm takes it, (B, C): an expanded view, without memory of its own."""
        return None if self.bias is None else self.bias.expand(len(self.x), -1)

    def written(self, ops: Ops) -> Tensor:
        """The sum (B, C, H, W), for where no norm follows."""
        if self.residual is None:
            return (
                self.x if self.bias is None else self.x + self.bias[:, None, None].to(self.x.dtype)
            )
        return ops.residual_add(self.x, self.residual, self.bias)


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

    def normalize(
        self,
        ops: Ops,
        x: Tensor,
        *,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
        skip: Tensor | None = None,
        return_sum: bool = False,
    ) -> Any:
        """Norm of x + shift + residual, concatenated with skip; with `return_sum` also that sum.

        x and residual are (B, C, H, W), shift (B, C), skip (B, C', H, W).
        """
        tensors = x, self.weight, self.bias, shift, residual, skip
        options = {"num_groups": self.num_groups, "eps": self.eps, "silu": self.silu}
        return ops.group_norm(*tensors, **options, return_sum=return_sum)

    def forward(
        self, pending: Pending, ops: Ops, skip: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The norm, and the pending sum (B, C, H, W) that was normalised."""
        if pending.bias is None and pending.residual is None:
            # Nothing waits: x is the sum, and the norm need not write a copy of it.
            return self.normalize(ops, pending.x, skip=skip), pending.x
        shift, residual = pending.shift, pending.residual
        return self.normalize(
            ops, pending.x, shift=shift, residual=residual, skip=skip, return_sum=True
        )
