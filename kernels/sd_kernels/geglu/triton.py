"""GEGLU in one pass each way.

A row of forward reads 2N numbers and writes N; one of backward reads 3N and writes 2N. Only x is
kept for backward. The bias of the linear layer before is added here, so that backward, which has
the gradient of x in registers, can sum the bias's gradient without another pass: each program keeps
the sums of its stripe of rows, and the one that comes last adds the stripes in a fixed order.

Shape letters: M rows (all leading axes), N columns of the output.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from sd_kernels.column_sum import add_rows, is_last, processors
from sd_kernels.errors import require, require_floating, require_one_dtype
from sd_kernels.launch import counters, empty, launch, rounded


@dataclass(frozen=True)
class Tuning:
    """Launch constants."""

    rows: int = 8
    """rows of a tile: with 256 columns 16 elements for each thread of 4 warps, two 16-byte loads"""
    columns: int = 256
    """columns of a tile: all widths of the UNet are multiples, so that no lane is idle"""
    programs_per_processor: int = 4
    """programs of the backward pass on a multiprocessor: 4 warps of up to 128 registers a thread
    fill its 65,536 registers"""


TUNING = Tuning()


@triton.jit
def _normal_cdf(x):
    """Phi(x), the standard normal distribution function, exact to float32."""
    # Phi(x) = (1 + erf(x / sqrt(2))) / 2
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _load(x, bias, start, M, stride, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Value and gate (ROWS, COLUMNS) in float32, their rows and columns, and which are inside."""
    # A tensor may have more than 2^31 elements: row numbers are multiplied by strides.
    rows = (start + tl.arange(0, ROWS).to(tl.int64))[:, None]
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = rows < M
    # Only ragged widths pay for a mask of columns, which would split the 16-byte accesses.
    if N % COLUMNS != 0:
        inside = inside & (columns < N)
    value = tl.load(x + rows * stride + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x + rows * stride + N + columns, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        # Broadcast addresses, not the loaded values: the loads then have the layout of the tile, 16
        # bytes a thread.
        wide = tl.broadcast_to(columns, (ROWS, COLUMNS))
        value += tl.load(bias + wide, mask=wide < N, other=0.0).to(tl.float32)
        gate += tl.load(bias + N + wide, mask=wide < N, other=0.0).to(tl.float32)
    return value, gate, rows, columns, inside


@triton.jit
def geglu_forward_kernel(
    x, bias, y, M, stride, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    value, gate, rows, columns, inside = _load(
        x, bias, tl.program_id(0) * ROWS, M, stride, N, ROWS, COLUMNS
    )
    # Shazeer, "GLU Variants Improve Transformer" (2020), eq. 5, with gelu(g) = g Phi(g).
    tl.store(y + rows * N + columns, value * (gate * _normal_cdf(gate)), mask=inside)


@triton.jit
def geglu_backward_kernel(
    x, bias, dy, dx, sums, dbias, counters, M, stride,
    N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # Each element of the tile has sums of its own, which are added across threads once, at the end.
    dvalue_sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    dgate_sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS):
        value, gate, rows, columns, inside = _load(x, bias, start, M, stride, N, ROWS, COLUMNS)
        # Elements outside have a gradient of zero and add nothing.
        grad = tl.load(dy + rows * N + columns, mask=inside, other=0.0).to(tl.float32)
        cdf = _normal_cdf(gate)
        # d gelu(g) / dg = Phi(g) + g phi(g), phi(g) = exp(-g^2 / 2) / sqrt(2 pi)
        slope = cdf + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
        dvalue = grad * (gate * cdf)
        dgate = grad * (value * slope)
        tl.store(dx + rows * 2 * N + columns, dvalue, mask=inside)
        tl.store(dx + rows * 2 * N + N + columns, dgate, mask=inside)
        if sums is not None:
            dvalue_sums += dvalue
            dgate_sums += dgate
    if sums is not None:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        place = sums + tl.program_id(0) * 2 * N + column
        tl.store(place, tl.sum(dvalue_sums, 0), mask=column < N)  # narrow: one row a program
        tl.store(place + N, tl.sum(dgate_sums, 0), mask=column < N)  # narrow: one row a program
        if is_last(counters + tl.program_id(1), tl.num_programs(0)):
            # Many rows at once, since each turn of the loop waits for its loads.
            add_rows(sums, dbias, column, column < N, tl.num_programs(0), 2 * N, 4 * ROWS)
            add_rows(sums, dbias, N + column, column < N, tl.num_programs(0), 2 * N, 4 * ROWS)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x (..., 2N) as rows (M, 2N) of adjacent elements; rows may be apart."""
    rows = x if x.dim() == 2 else x.flatten(0, -2)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _launch(kernel: Any, stripes: int, *tensors: torch.Tensor | None, M: int, N: int) -> None:
    """Run a kernel over M rows of N outputs in stripes; the first tensor has the rows of x."""
    assert tensors[0] is not None
    grid = stripes, triton.cdiv(N, TUNING.columns)
    tile = {"ROWS": TUNING.rows, "COLUMNS": TUNING.columns}
    launch(kernel, grid, *tensors, M, tensors[0].stride(0), N=N, **tile)


@torch.library.custom_op("sd_kernels::geglu_forward", mutates_args=())
def geglu_forward(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x (..., 2N) to (..., N)."""
    rows = _rows(x)
    M, N = rows.shape[0], rows.shape[1] // 2
    y = empty(x, (*x.shape[:-1], N))
    bias = None if bias is None else bias.contiguous()
    _launch(geglu_forward_kernel, triton.cdiv(M, TUNING.rows), rows, bias, y, M=M, N=N)
    return rounded(y, x.dtype)


@torch.library.custom_op("sd_kernels::geglu_backward", mutates_args=())
def geglu_backward(x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """The gradient of x (..., 2N), from that of the output (..., N)."""
    rows = _rows(x)
    M, N = rows.shape[0], rows.shape[1] // 2
    dx = empty(x, tuple(x.shape))
    tensors = rows, None, dy.contiguous(), dx, None, None, None
    _launch(geglu_backward_kernel, triton.cdiv(M, TUNING.rows), *tensors, M=M, N=N)
    return rounded(dx, x.dtype)


@torch.library.custom_op("sd_kernels::geglu_backward_with_bias", mutates_args=())
def geglu_backward_with_bias(
    x: torch.Tensor, bias: torch.Tensor, dy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x (..., 2N) and of bias (2N,)."""
    rows = _rows(x)
    M, N = rows.shape[0], rows.shape[1] // 2
    resident = TUNING.programs_per_processor * processors(x)
    stripes = triton.cdiv(resident, triton.cdiv(N, TUNING.columns))
    stripes = min(stripes, triton.cdiv(M, TUNING.rows))
    dx, dbias = empty(x, tuple(x.shape)), empty(bias, (2 * N,))
    sums = empty(x, (stripes, 2 * N), torch.float32)
    tiles = triton.cdiv(N, TUNING.columns)
    arrivals = counters(x, tiles, geglu_backward_kernel, stripes)
    tensors = rows, bias.contiguous(), dy.contiguous(), dx, sums, dbias, arrivals
    _launch(geglu_backward_kernel, stripes, *tensors, M=M, N=N)
    return rounded(dx, x.dtype), rounded(dbias, bias.dtype)


@geglu_forward.register_fake
def _(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@geglu_backward.register_fake
def _(x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


@geglu_backward_with_bias.register_fake
def _(x: torch.Tensor, bias: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), bias.new_empty(bias.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    x, bias = ctx.saved_tensors
    if bias is None:
        return geglu_backward(x, dy), None
    return geglu_backward_with_bias(x, bias, dy)


geglu_forward.register_autograd(_backward, setup_context=_save)


def geglu(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See `reference.geglu`; float32, bfloat16 or float16, computed in float32."""
    tensors = (x,) if bias is None else (x, bias)
    require_floating("geglu", *tensors)
    require_one_dtype("geglu", *tensors)
    got, takes = f"shape {tuple(x.shape)}", "an even last axis"
    require(x.dim() >= 1 and x.shape[-1] % 2 == 0, "geglu", got, takes)
    if bias is not None:
        got = f"a bias of shape {tuple(bias.shape)}"
        require(bias.shape == x.shape[-1:], "geglu", got, f"({x.shape[-1]},)")
    return geglu_forward(x, bias)
