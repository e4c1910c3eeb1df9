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


class _Adjacent(torch.autograd.Function):
    """Weights (N, ...) that lie one behind the other in memory, as the one tensor that they are."""

    @staticmethod
    def forward(ctx: Any, *weights: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)  # there is none where a sink has taken it
        ctx.rows = [weight.shape[0] for weight in weights]
        return weights[0].as_strided((sum(ctx.rows), *weights[0].shape[1:]), weights[0].stride())

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None,) * len(ctx.rows) if grad is None else grad.split(ctx.rows)


def packed(weights: list[Tensor]) -> Tensor:
    """Weights one behind the other, (N, K) each or (N,).

    Training keeps the parameters in one buffer (`training.flat`), where those that are packed are
    adjacent; then nothing is copied. Elsewhere, and while torch.compile traces, it is a `cat`.
    """
    if torch.compiler.is_compiling():
        return torch.cat(weights)
    storage, end = weights[0].untyped_storage().data_ptr(), weights[0].storage_offset()
    for weight in weights:
        here = weight.untyped_storage().data_ptr(), weight.storage_offset()
        if here != (storage, end) or not weight.is_contiguous():
            return torch.cat(weights)
        end += weight.numel()
    whole = _Adjacent.apply(*weights)
    if sinks := [weight.gradient_sink for weight in weights if hasattr(weight, "gradient_sink")]:
        whole.gradient_sink = sinks[0].joined(sinks)
    return whole


def added(vectors: list[Tensor]) -> Tensor:
    """The sums of the first half of the vectors and the second, one behind the other.

    They are packed before they are added, and so every vector has a gradient of its own. For
    vectors that are added first, autograd has one tensor for both, which is copied for the second.
    """
    return packed(vectors).view(2, -1).sum(0)


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
        """The norm; with it `return_sum` times what was normalised, the sum beside `skip`.

        Whoever reads it later should take one of these, each reader another, since the norm's
        backward pass then adds their gradients. With `return_sum` 0 the result is a tensor.
        """
        tensors = pending.x, self.weight, self.bias, pending.bias, pending.residual, skip
        options = {"num_groups": self.num_groups, "eps": self.eps, "silu": self.silu}
        return ops.group_norm(*tensors, **options, return_sum=return_sum)
