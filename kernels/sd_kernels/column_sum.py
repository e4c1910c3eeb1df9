"""Sums over rows, the gradient of a vector that was broadcast over them, in one pass.

Each program sums a stripe of rows into a row of partial sums; the same kernel then sums these. The
order is fixed by the shape and the GPU, so that sums are repeatable.

Shape letters: M rows, N columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sd_kernels.launch import empty, interpreted, launch, rounded
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
    """most rows of a single stripe: eight turns of the loop; a second launch would take longer"""
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
def column_sum_kernel(
    x, sums, M, stride, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
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
    sums = empty(x, (stripes, N), torch.float32 if stripes > 1 else dtype)
    sizes = {"N": N, "ROWS": TUNING.rows, "COLUMNS": columns}
    launch(column_sum_kernel, (tiles, stripes), x, sums, M, x.stride(0), **sizes)
    return rounded(sums, dtype).flatten() if stripes == 1 else column_sum(sums, dtype)


@column_sum.register_fake
def _(x, dtype):
    return x.new_empty(x.shape[1], dtype=dtype)
