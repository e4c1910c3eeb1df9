"""GEGLU in one pass each way.

A row of forward reads 2N numbers and writes N; one of backward reads 3N and writes 2N. Only x is
kept for backward.

Shape letters: M rows (all leading axes), N columns of the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from sd_kernels.errors import require, require_floating
from sd_kernels.launch import empty, launch, rounded


@dataclass(frozen=True)
class Tuning:
    """Launch constants."""

    rows: int = 8
    """rows of a tile: with 256 columns 16 elements for each thread of 4 warps, two 16-byte loads"""
    columns: int = 256
    """columns of a tile: all widths of the UNet are multiples, so that no lane is idle"""


TUNING = Tuning()


@triton.jit
def _normal_cdf(x):
    """Phi(x), the standard normal distribution function, exact to float32."""
    # Phi(x) = (1 + erf(x / sqrt(2))) / 2
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _tile(M, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows (ROWS, 1) and columns (1, COLUMNS) of a program, and which elements are inside."""
    # A tensor may have more than 2^31 elements: row numbers are multiplied by strides.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < M)[:, None]
    # Only ragged widths pay for a mask of columns, which would split the 16-byte accesses.
    if N % COLUMNS != 0:
        inside = inside & (columns < N)[None, :]
    return rows[:, None], columns[None, :], inside


@triton.jit
def geglu_forward_kernel(
    x, y, M, stride, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    rows, columns, inside = _tile(M, N, ROWS, COLUMNS)
    value = tl.load(x + rows * stride + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x + rows * stride + N + columns, mask=inside, other=0.0).to(tl.float32)
    # Shazeer, "GLU Variants Improve Transformer" (2020), eq. 5, with gelu(g) = g Phi(g).
    tl.store(y + rows * N + columns, value * (gate * _normal_cdf(gate)), mask=inside)


@triton.jit
def geglu_backward_kernel(
    x, dy, dx, M, stride, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    rows, columns, inside = _tile(M, N, ROWS, COLUMNS)
    value = tl.load(x + rows * stride + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x + rows * stride + N + columns, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dy + rows * N + columns, mask=inside, other=0.0).to(tl.float32)
    cdf = _normal_cdf(gate)
    # d gelu(g) / dg = Phi(g) + g phi(g), phi(g) = exp(-g^2 / 2) / sqrt(2 pi)
    slope = cdf + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    tl.store(dx + rows * 2 * N + columns, grad * (gate * cdf), mask=inside)
    tl.store(dx + rows * 2 * N + N + columns, grad * (value * slope), mask=inside)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x (..., 2N) as rows (M, 2N) of adjacent elements; rows may be apart."""
    rows = x if x.dim() == 2 else x.flatten(0, -2)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _launch(kernel: Any, tensors: tuple[torch.Tensor, ...], M: int, N: int) -> None:
    """Run a kernel over M rows of N outputs; the first tensor has the rows of x."""
    grid = triton.cdiv(M, TUNING.rows), triton.cdiv(N, TUNING.columns)
    tile = {"ROWS": TUNING.rows, "COLUMNS": TUNING.columns}
    launch(kernel, grid, *tensors, M, tensors[0].stride(0), N=N, **tile)


@torch.library.custom_op("sd_kernels::geglu_forward", mutates_args=())
def geglu_forward(x: torch.Tensor) -> torch.Tensor:
    """x (..., 2N) to (..., N)."""
    rows = _rows(x)
    M, N = rows.shape[0], rows.shape[1] // 2
    y = empty(x, (*x.shape[:-1], N))
    _launch(geglu_forward_kernel, (rows, y), M, N)
    return rounded(y, x.dtype)


@torch.library.custom_op("sd_kernels::geglu_backward", mutates_args=())
def geglu_backward(x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """The gradient of x (..., 2N), from that of the output (..., N)."""
    rows = _rows(x)
    M, N = rows.shape[0], rows.shape[1] // 2
    dx = empty(x, tuple(x.shape))
    _launch(geglu_backward_kernel, (rows, dy.contiguous(), dx), M, N)
    return rounded(dx, x.dtype)


@geglu_forward.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@geglu_backward.register_fake
def _(x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
    return geglu_backward(*ctx.saved_tensors, dy)


geglu_forward.register_autograd(_backward, setup_context=_save)


def geglu(x: torch.Tensor) -> torch.Tensor:
    """See `reference.geglu`; float32, bfloat16 or float16, computed in float32."""
    require_floating("geglu", x)
    require(
        x.dim() >= 1 and x.shape[-1] % 2 == 0,
        "geglu",
        f"shape {tuple(x.shape)}",
        "an even last axis",
    )
    return geglu_forward(x)
