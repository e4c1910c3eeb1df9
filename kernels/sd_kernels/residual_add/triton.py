"""Residual sum with bias: one pass forward; backward reads the gradient once, for the bias, and
hands it on as it is.

Shape letters: M rows (pixels or tokens), C columns.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sd_kernels.column_sum import column_sum
from sd_kernels.errors import require, require_floating, require_one_dtype
from sd_kernels.launch import empty, launch, rounded

ROWS, COLUMNS = 32, 64
"""tile of a program: every width of the UNet is a multiple of 64; 4 warps have two 16-byte loads a
thread and tensor"""


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
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    inside = rows < M
    if C % COLUMNS != 0:
        inside = inside & (columns < C)
    summed = tl.load(x + rows * stride + columns, mask=inside, other=0.0).to(tl.float32)
    summed += tl.load(residual + rows * residual_stride + columns, mask=inside, other=0.0).to(
        tl.float32
    )
    if bias is not None:
        # In the layout of the tile: 16 bytes a thread.
        everywhere = tl.broadcast_to(columns, (ROWS, COLUMNS))
        summed += tl.load(bias + everywhere, mask=everywhere < C, other=0.0).to(tl.float32)
    tl.store(y + rows * C + columns, summed, mask=inside)


def _rows(x: torch.Tensor) -> torch.Tensor:
    pixels = x.permute(0, 2, 3, 1) if x.dim() == 4 else x
    rows = pixels.reshape(-1, pixels.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


@torch.library.custom_op("sd_kernels::residual_add_forward", mutates_args=())
def residual_add_forward(
    x: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    rows, added = _rows(x), _rows(residual)
    (M, C), y = rows.shape, empty(x)
    arguments = (
        rows,
        added,
        None if bias is None else bias.contiguous(),
        y,
        M,
        rows.stride(0),
        added.stride(0),
    )
    grid = triton.cdiv(C, COLUMNS), triton.cdiv(M, ROWS)
    launch(residual_add_kernel, grid, *arguments, C=C, ROWS=ROWS, COLUMNS=COLUMNS)
    return rounded(y, x.dtype)


@torch.library.custom_op("sd_kernels::residual_add_backward", mutates_args=())
def residual_add_backward(dy: torch.Tensor) -> torch.Tensor:
    """The gradient of the bias; those of x and residual are dy itself."""
    return column_sum(_rows(dy), dy.dtype)


@residual_add_forward.register_fake
def _(x: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    dense = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    return torch.empty_like(x, memory_format=dense)


@residual_add_backward.register_fake
def _(dy: torch.Tensor) -> torch.Tensor:
    return dy.new_empty(dy.shape[1 if dy.dim() == 4 else -1])


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return dy, dy, residual_add_backward(dy) if ctx.needs_input_grad[2] else None


residual_add_forward.register_autograd(_backward)


def residual_add(
    x: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """See `reference.residual_add`; images in channels-last memory; float32, bfloat16 or
    float16."""
    tensors = [x, residual] + ([] if bias is None else [bias])
    require_floating("residual_add", *tensors)
    require_one_dtype("residual_add", *tensors)
    require(x.dim() > 0, "residual_add", "a number", "images (B, C, H, W) or tokens (..., C)")
    C = x.shape[1 if x.dim() == 4 else -1]
    for tensor, shape in ((residual, x.shape), (bias, (C,))):
        if tensor is not None:
            require(
                tensor.shape == shape,
                "residual_add",
                f"shape {tuple(tensor.shape)}",
                f"{tuple(shape)} beside x",
            )
    for tensor in (x, residual):
        require(
            tensor.dim() != 4 or tensor.stride(1) == 1,
            "residual_add",
            "another layout",
            "channels-last images",
        )
    return residual_add_forward(x, residual, bias)
