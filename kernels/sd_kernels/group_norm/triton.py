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
    kept = (summed, None, None) if return_sum else (x, shift, residual)
    ctx.save_for_backward(*kept, weight, bias, skip, mean, rstd)
    ctx.silu, ctx.has_residual = silu, residual is not None
    # An output without a gradient gives None, not a tensor of zeros that is written and read.
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dy: torch.Tensor | None, dsummed: torch.Tensor | None, *_: Any
) -> tuple[Any, ...]:
    x, shift, residual, weight, bias, skip, mean, rstd = ctx.saved_tensors
    if dy is None:
        B, _, H, W = x.shape
        dy = x.new_zeros(B, H, W, weight.shape[0]).permute(0, 3, 1, 2)
    # The fourth input is the shift.
    shift_gradient = ctx.needs_input_grad[3]
    dx, dskip, dweight, dbias, dshift = group_norm_backward(
        dy, dsummed, x, weight, bias, shift, residual, skip, mean, rstd, ctx.silu, shift_gradient
    )
    # x and residual enter as a sum, so that they share one gradient.
    optional = (
        dshift if shift_gradient else None,
        dx if ctx.has_residual else None,
        None if skip is None else dskip,
    )
    return dx, dweight, dbias, *optional, None, None, None, None


group_norm_forward.register_autograd(_backward, setup_context=_save)


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
    return_sum: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """See `reference.group_norm`; float32, bfloat16 or float16, statistics in float32.

    Images must be in channels-last memory (pixels may be apart), channels of `shift` adjacent;
    otherwise KernelError.
    """
    check(x, weight, bias, shift, residual, skip, num_groups)
    for name, image in {"x": x, "residual": residual, "skip": skip}.items():
        if image is not None:
            order = f"{name} of shape {tuple(image.shape)} with strides {image.stride()}"
            takes = "channels-last memory (x.to(memory_format=torch.channels_last))"
            require(is_channels_last(image), "group_norm", order, takes)
    if shift is not None:
        adjacent = shift.stride(1) == 1 or shift.shape[1] == 1
        got = f"a shift with strides {shift.stride()}"
        require(adjacent, "group_norm", got, "channels adjacent")
    y, summed, _, _ = group_norm_forward(
        x, weight, bias, shift, residual, skip, num_groups, eps, silu, return_sum
    )
    return (y, summed) if return_sum else y
