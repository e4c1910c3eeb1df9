"""Sums over rows, the gradient of a vector that was broadcast over them, in one launch.

Each program sums a stripe of rows into a row of partial sums; of those of the same columns, the
program that comes last adds these rows up. The order of sums is fixed by the shape and the GPU, so
that they are repeatable.

Shape letters: M rows, N columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sd_kernels.launch import counters, empty, interpreted, launch, rounded
from sd_kernels.targets import GPUS


@dataclass(frozen=True)
class Tuning:
    """Launch constants."""

    rows: int = 64
    """rows of a tile: of 128 bytes each, so that each thread of 4 warps has four 16-byte loads in
    flight"""
    tile_bytes: int = 128
    """bytes of a tile's row: a whole cache line"""
    single_stripe_rows: int = 512
    """most rows of a single stripe: eight turns of the loop, and nothing to add up after it"""
    programs_per_processor: int = 8
    """programs on a multiprocessor: 32 warps, half of those that it holds, hide the latency"""


TUNING = Tuning()


def processors(tensor: torch.Tensor) -> int:
    """Multiprocessors of the tensor's GPU; an H100's where a launch is only recorded.

    One in the interpreter, so that each stripe takes several turns of the loop there.
    """
    if tensor.is_cuda:
        return torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return 1 if interpreted() else GPUS["h100"].multiprocessors


@triton.jit
def is_last(counter, programs):
    """Whether the programs that share the counter have all stored what came before this call.

    It is True in one of them, the one that comes last; see `launch.counters`.
    """
    # One thread does the atomic. The barrier puts the stores of all threads before it, and the
    # release makes them visible with it (PTX ISA, Memory Consistency Model, causality order).
    tl.debug_barrier()
    arrived = tl.atomic_add(counter, 1, sem="acq_rel")  # narrow: a counter
    return arrived % programs == programs - 1


@triton.jit
def add_rows(parts, total, columns, is_column, rows, N: tl.constexpr, ROWS: tl.constexpr):
    """Adds the rows of parts (rows, N) float32, which other programs stored, at some columns."""
    sums = tl.zeros((ROWS, columns.shape[0]), tl.float32)
    for start in tl.range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        place = parts + row * N + columns[None, :]
        inside = (row < rows) & is_column[None, :]
        # .cg reads from the L2 cache: first-level caches are not coherent within a launch.
        sums += tl.load(place, mask=inside, other=0.0, cache_modifier=".cg")  # narrow: partial sums
    tl.store(total + columns, tl.sum(sums, 0), mask=is_column)  # narrow: once


@triton.jit
def column_sum_kernel(
    x,
    sums,
    total,
    counters,
    M,
    stride,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    # Stripes are interleaved tile by tile, so that programs that run together read adjacent rows.
    stripe = tl.program_id(1)
    # Each row of the tile has sums of its own, which are added across threads once, at the end.
    tile_sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(stripe * ROWS, M, tl.num_programs(1) * ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)[:, None]
        inside = rows < M
        # Only ragged widths pay for a mask of columns, which would split the 16-byte accesses.
        if N % COLUMNS != 0:
            inside = inside & (columns < N)[None, :]
        tile = tl.load(x + rows * stride + columns[None, :], mask=inside, other=0.0)
        tile_sums += tile.to(tl.float32)
    place = sums + stripe * N + columns
    tl.store(place, tl.sum(tile_sums, 0), mask=columns < N)  # narrow: one row a program
    if total is not None:  # noqa: SIM102 (known to the compiler, the other to the GPU)
        if is_last(counters + tl.program_id(0), tl.num_programs(1)):
            add_rows(sums, total, columns, columns < N, tl.num_programs(1), N, ROWS)


@torch.library.custom_op("sd_kernels::column_sum", mutates_args=())
def column_sum(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sum (N,) of x (M, N) over its rows, computed in float32 and rounded to `dtype`.

    The elements of a row must be adjacent; rows may be apart.
    """
    M, N = x.shape
    columns = TUNING.tile_bytes // x.element_size()
    tiles = triton.cdiv(N, columns)
    stripes = 1
    if TUNING.single_stripe_rows < M:
        resident = TUNING.programs_per_processor * processors(x)
        stripes = min(triton.cdiv(M, TUNING.rows), triton.cdiv(resident, tiles))
    result, sums, arrivals = empty(x, (N,), dtype), None, None
    if stripes > 1:
        sums = empty(x, (stripes, N), torch.float32)
        arrivals = counters(x, tiles, column_sum_kernel, stripes)
    tensors = (x, result, None, None) if sums is None else (x, sums, result, arrivals)
    sizes = {"N": N, "ROWS": TUNING.rows, "COLUMNS": columns}
    launch(column_sum_kernel, (tiles, stripes), *tensors, M, x.stride(0), **sizes)
    return rounded(result, dtype)


@column_sum.register_fake
def _(x, dtype):
    return x.new_empty(x.shape[1], dtype=dtype)
