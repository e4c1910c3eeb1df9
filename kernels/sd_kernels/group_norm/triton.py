"""Group normalisation in one launch each way, each of which reads device memory once.

Two sweeps are inherent: statistics first, then results. Here both are in one launch; `tiles` has
the order that lets the second sweep read from the L2 cache. The kernels are in `forward` and
`backward`; this file ties them to autograd.

Passes over device memory: forward 1 read and 1 write (a residual: 1 more read; the returned sum: 1
more write), backward 2 reads (x, dy) and 1 write. Apex's Hopper kernels take one more read forward
above 1,024 pixels, and two more backward.

Shape letters: B samples, C = C1 + C2 channels (first source, second source), H and W rows and
columns, G groups.
"""

from __future__ import annotations

from typing import Any

import torch

from sd_kernels.errors import require
from sd_kernels.group_norm.backward import group_norm_backward
from sd_kernels.group_norm.checks import check
from sd_kernels.group_norm.forward import group_norm_forward
from sd_kernels.group_norm.rows import is_channels_last


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, bias, shift, residual, skip, _, _, silu, return_sum = inputs
    _, summed, mean, rstd = output
    # The sum stands for its parts: it is what was normalised, and is kept alive anyway.
    kept = (summed, None, None, None) if return_sum else (x, shift, residual, skip)
    ctx.save_for_backward(*kept, weight, bias, mean, rstd)
    ctx.silu, ctx.channels = silu, x.shape[1]
    ctx.has_residual, ctx.has_skip = residual is not None, skip is not None
    ctx.shift_axes = 0 if shift is None else shift.dim()
    # An output without a gradient gives None, not a tensor of zeros that is written and read.
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any,
    dy: torch.Tensor | None,
    dsummed: tuple[torch.Tensor | None, ...],
    *,
    shift_gradient: bool,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of x, weight, bias, shift, residual and skip."""
    x, shift, residual, skip, weight, bias, mean, rstd = ctx.saved_tensors
    B, _, H, W = x.shape
    whole = B, weight.shape[0], H, W
    if dy is None:
        dy = x.new_zeros(B, H, W, weight.shape[0]).permute(0, 3, 1, 2)
    given = [grad for grad in dsummed if grad is not None and grad.shape == whole]
    axes = ctx.shift_axes if shift_gradient else 0
    normed = x, weight, bias, shift, residual, skip, mean, rstd
    options = ctx.channels, ctx.silu, axes
    dx, dskip, vectors, of_samples = group_norm_backward(dy, given, *normed, *options)
    dbias, dweight, *dshift = vectors.unbind()
    if axes == 1:
        of_samples = dshift[0][: ctx.channels]
    # x and residual enter as a sum, so that they share one gradient.
    optional = (
        of_samples if axes else None,
        dx if ctx.has_residual else None,
        dskip if ctx.has_skip else None,
    )
    return dx, dweight, dbias, *optional


def _backward(
    ctx: Any, dy: torch.Tensor | None, dsummed: torch.Tensor | None, *_: Any
) -> tuple[torch.Tensor | None, ...]:
    wanted = ctx.needs_input_grad[3]
    return *_gradients(ctx, dy, (dsummed,), shift_gradient=wanted), None, None, None, None


group_norm_forward.register_autograd(_backward, setup_context=_save)


class _ReturningTwice(torch.autograd.Function):
    """The norm that returns the sum twice, which a registered op may not do.

    So the gradients of both later uses come into this backward pass, and are not added in a pass of
    their own.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, ...]:
        output = group_norm_forward(*inputs)
        _save(ctx, inputs, output)
        y, summed = output[:2]
        return y, summed, summed.view_as(summed)

    @staticmethod
    def backward(ctx: Any, dy: Any, *dsummed: Any) -> tuple[torch.Tensor | None, ...]:
        wanted = ctx.needs_input_grad[3]
        return *_gradients(ctx, dy, dsummed, shift_gradient=wanted), None, None, None, None


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
    """See `reference.group_norm`; float32, bfloat16 or float16, statistics in float32.

    Images must be in channels-last memory (pixels may be apart), channels of `shift` adjacent;
    otherwise KernelError. The gradients of all that is returned are added in the one backward pass.
    """
    check(x, weight, bias, shift, residual, skip, num_groups)
    for name, image in {"x": x, "residual": residual, "skip": skip}.items():
        if image is not None:
            order = f"{name} of shape {tuple(image.shape)} with strides {image.stride()}"
            takes = "channels-last memory (x.to(memory_format=torch.channels_last))"
            require(is_channels_last(image), "group_norm", order, takes)
    if shift is not None:
        adjacent = shift.stride(-1) == 1 or shift.shape[-1] == 1
        got = f"a shift with strides {shift.stride()}"
        require(adjacent, "group_norm", got, "channels adjacent")
    most = f"the sum returned {return_sum} times"
    require(0 <= return_sum <= 2, "group_norm", most, "0, 1 or 2")
    inputs = x, weight, bias, shift, residual, skip, num_groups, eps, silu, return_sum > 0
    if return_sum > 1:
        return _ReturningTwice.apply(*inputs)
    y, summed, _, _ = group_norm_forward(*inputs)
    return (y, summed) if return_sum else y
