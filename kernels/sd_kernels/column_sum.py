"""Sums over rows, the gradient of what was broadcast over them: one pass over the rows, always in
the same order.

Programs sum stripes of rows into a row of partial sums each; the same kernel then sums those.

Shape letters: M rows, N columns, P stripes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sd_kernels.launch import empty, interpreted, launch, rounded

ROWS = 64
"""rows of a tile, 128 bytes wide: 4 warps have four 16-byte loads a thread in flight"""
SINGLE = 512
"""up to so many rows one stripe is enough"""
PER_PROCESSOR = 8
"""programs a multiprocessor"""


def processors(tensor: torch.Tensor) -> int:
    """Multiprocessors of the tensor's GPU; few in the interpreter, so that stripes take several
    turns there."""
    if tensor.is_cuda:
        return torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return 1 if interpreted() else 132


@triton.jit
def column_sum_kernel(
    x, sums, M, stride, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    stripe = tl.program_id(1)
    sums_by_row = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in tl.range(stripe * ROWS, M, tl.num_programs(1) * ROWS):
        rows = start + tl.arange(0, ROWS).to(tl.int64)[:, None]
        inside = rows < M
        if N % COLUMNS != 0:
            inside = inside & (columns < N)[None, :]
        sums_by_row += tl.load(x + rows * stride + columns[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
    tl.store(
        sums + stripe * N + columns, tl.sum(sums_by_row, 0), mask=columns < N
    )  # narrow: one row a program


@torch.library.custom_op("sd_kernels::column_sum", mutates_args=())
def column_sum(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sum of x (M, N), rows of adjacent elements, over M in float32; (N,) of `dtype`."""
    M, N = x.shape
    columns = 128 // x.element_size()
    tiles = triton.cdiv(N, columns)
    stripes = (
        1
        if M <= SINGLE
        else min(triton.cdiv(M, ROWS), triton.cdiv(PER_PROCESSOR * processors(x), tiles))
    )
    sums = empty(x, (stripes, N), torch.float32 if stripes > 1 else dtype)
    launch(
        column_sum_kernel,
        (tiles, stripes),
        x,
        sums,
        M,
        x.stride(0),
        N=N,
        ROWS=ROWS,
        COLUMNS=columns,
    )
    return rounded(sums, dtype).flatten() if stripes == 1 else column_sum(sums, dtype)


@column_sum.register_fake
def _(x, dtype):
    return x.new_empty(x.shape[1], dtype=dtype)
