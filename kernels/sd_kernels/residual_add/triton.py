"""Residual sum with bias in one pass.

Backward returns the gradient of the sum itself as that of x and of residual, and reads it once for
the gradient of the bias.

Shape letters: M rows (pixels or tokens), C columns (channels).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from sd_kernels.column_sum import column_sum
from sd_kernels.errors import require, require_floating, require_one_dtype
from sd_kernels.launch import empty, launch, rounded


@dataclass(frozen=True)
class Tuning:
    """Launch constants."""

    rows: int = 32
    """rows of a tile: with 64 columns 16 elements for each thread of 4 warps, two 16-byte loads of
    each tensor"""
    columns: int = 64
    """columns of a tile: all widths of the UNet are multiples, so that no lane is idle"""


TUNING = Tuning()


@triton.jit
def residual_add_kernel(
    x,
    residual,
    bias,
    y,
    M,
    stride,
    residual_stride,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # Tiles are numbered along rows first, so that programs read memory in its order. The grid has
    # one axis, since the others end at 65,535, which the rows of a batch of 512 pass.
    TILES: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    columns = tl.program_id(0) % TILES * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    rows = tl.program_id(0) // TILES * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    inside = rows < M
    # Only ragged widths pay for a mask of columns, which would split the 16-byte accesses.
    if C % COLUMNS != 0:
        inside = inside & (columns < C)
    # Added in float32 and rounded once, where two additions of torch round twice.
    summed = tl.load(x + rows * stride + columns, mask=inside, other=0.0).to(tl.float32)
    summed += tl.load(residual + rows * residual_stride + columns, mask=inside, other=0.0).to(
        tl.float32
    )
    if bias is not None:
        # Broadcast addresses, not the loaded values: the load then has the layout of the tile, 16
        # bytes a thread.
        everywhere = tl.broadcast_to(columns, (ROWS, COLUMNS))
        summed += tl.load(bias + everywhere, mask=everywhere < C, other=0.0).to(tl.float32)
    tl.store(y + rows * C + columns, summed, mask=inside)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Images (B, C, H, W) or tokens (..., C) as rows (M, C) of adjacent elements."""
    pixels = x.permute(0, 2, 3, 1) if x.dim() == 4 else x
    rows = pixels.reshape(-1, pixels.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


@torch.library.custom_op("sd_kernels::residual_add_forward", mutates_args=())
def residual_add_forward(
    x: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """The sum, in the shape, dtype and memory order of x."""
    rows, residual_rows = _rows(x), _rows(residual)
    (M, C), y = rows.shape, empty(x)
    tensors = rows, residual_rows, None if bias is None else bias.contiguous(), y
    launch(
        residual_add_kernel,
        (triton.cdiv(C, TUNING.columns) * triton.cdiv(M, TUNING.rows),),
        *(*tensors, M, rows.stride(0), residual_rows.stride(0)),
        C=C,
        ROWS=TUNING.rows,
        COLUMNS=TUNING.columns,
    )
    return rounded(y, x.dtype)


@torch.library.custom_op("sd_kernels::residual_add_backward", mutates_args=())
def residual_add_backward(dy: torch.Tensor) -> torch.Tensor:
    """The gradient of the bias (C,); those of x and residual are dy itself."""
    return column_sum(_rows(dy), dy.dtype)


@residual_add_forward.register_fake
def _(x: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    dense = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    return torch.empty_like(x, memory_format=dense)


@residual_add_backward.register_fake
def _(dy: torch.Tensor) -> torch.Tensor:
    return dy.new_empty(dy.shape[1 if dy.dim() == 4 else -1])


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    # x and residual get one tensor: autograd adds in place only where nothing else holds it.
    return dy, dy, residual_add_backward(dy) if ctx.needs_input_grad[2] else None


residual_add_forward.register_autograd(_backward)


def residual_add(
    x: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """See `reference.residual_add`; float32, bfloat16 or float16.

    Images must be in channels-last memory; KernelError otherwise.
    """
    tensors = [x, residual] + ([] if bias is None else [bias])
    require_floating("residual_add", *tensors)
    require_one_dtype("residual_add", *tensors)
    require(x.dim() > 0, "residual_add", "a number", "images (B, C, H, W) or tokens (..., C)")
    C = x.shape[1 if x.dim() == 4 else -1]
    for tensor, shape in ((residual, x.shape), (bias, (C,))):
        if tensor is not None:
            got = f"shape {tuple(tensor.shape)}"
            require(tensor.shape == shape, "residual_add", got, f"{tuple(shape)} beside x")
    for tensor in (x, residual):
        is_channels_last = tensor.dim() != 4 or tensor.stride(1) == 1
        require(is_channels_last, "residual_add", "another layout", "channels-last images")
    return residual_add_forward(x, residual, bias)
