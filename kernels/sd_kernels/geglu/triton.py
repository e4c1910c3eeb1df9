"""GEGLU in one pass each way: forward reads 2N and writes N, backward reads 3N and writes 2N,
keeping only x.

Shape letters: M rows (all leading axes), N columns of the output.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sd_kernels.errors import require, require_floating
from sd_kernels.launch import empty, launch, rounded

ROWS, COLUMNS = 8, 256
"""tile of a program: every width of the UNet is a multiple of 256; 4 warps have 16 elements a
thread"""


@triton.jit
def _normal_cdf(x):
    """Phi(x), exact to float32."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _tile(M, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < M)[:, None]
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
    # d gelu(g) / dg = Phi(g) + g phi(g)
    slope = cdf + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    tl.store(dx + rows * 2 * N + columns, grad * (gate * cdf), mask=inside)
    tl.store(dx + rows * 2 * N + N + columns, grad * (value * slope), mask=inside)


def _rows(x: torch.Tensor) -> torch.Tensor:
    rows = x if x.dim() == 2 else x.flatten(0, -2)
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _grid(M: int, N: int) -> tuple[int, int]:
    return triton.cdiv(M, ROWS), triton.cdiv(N, COLUMNS)


@torch.library.custom_op("sd_kernels::geglu_forward", mutates_args=())
def geglu_forward(x: torch.Tensor) -> torch.Tensor:
    rows = _rows(x)
    M, N = rows.shape[0], rows.shape[1] // 2
    y = empty(x, (*x.shape[:-1], N))
    launch(
        geglu_forward_kernel,
        _grid(M, N),
        rows,
        y,
        M,
        rows.stride(0),
        N=N,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
    )
    return rounded(y, x.dtype)


@torch.library.custom_op("sd_kernels::geglu_backward", mutates_args=())
def geglu_backward(x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    rows = _rows(x)
    M, N = rows.shape[0], rows.shape[1] // 2
    dx = empty(x, tuple(x.shape))
    arguments = rows, dy.contiguous(), dx, M, rows.stride(0)
    launch(geglu_backward_kernel, _grid(M, N), *arguments, N=N, ROWS=ROWS, COLUMNS=COLUMNS)
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
    """See `reference.geglu`; float32, bfloat16 or float16, statistics in float32."""
    require_floating("geglu", x)
    require(
        x.dim() >= 1 and x.shape[-1] % 2 == 0,
        "geglu",
        f"shape {tuple(x.shape)}",
        "an even last axis",
    )
    return geglu_forward(x)
