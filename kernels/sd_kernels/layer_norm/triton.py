"""LayerNorm of a residual sum in one pass each way.

Forward reads x and residual and writes their sum and its norm; statistics are two-pass over
registers. Backward reads the sum and the gradients of both outputs, and writes one gradient, which
is that of x and of residual; each program keeps sums for weight and bias over its stripe of rows,
added up in a fixed order at the end.

Every width of the UNet is 5 * 2^k, so a row is five tiles of K columns: no idle lanes, five
independent 16-byte loads a thread and tensor, one sum across lanes for all five.

Shape letters: M rows (all leading axes), C columns, K columns of a tile, P programs of the backward
pass.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sd_kernels.column_sum import column_sum, processors
from sd_kernels.errors import require
from sd_kernels.launch import empty, launch, rounded
from sd_kernels.layer_norm.checks import check

TILES = tl.constexpr(5)
ELEMENTS = 1024
"""of a tile: 4 warps have 8 a thread, so that a row of up to 1280 lies in one warp"""
WIDEST = TILES.value * ELEMENTS
BACKWARD_PER_PROCESSOR = 2
"""programs a multiprocessor that fit at once beside their sums"""


@triton.jit
def _with(tiles, tile):
    """One more tile."""
    return tiles + (tile,)  # noqa: RUF005 (Triton knows no starred tuples)


@triton.jit
def _rows_of(start, M, ROWS: tl.constexpr):
    rows = start + tl.arange(0, ROWS).to(tl.int64)
    return rows, rows < M


@triton.jit
def _columns_of(i: tl.constexpr, is_row, C: tl.constexpr, K: tl.constexpr):
    """Columns of tile i, and which elements are inside."""
    columns = (i * K + tl.arange(0, K))[None, :]
    inside = is_row[:, None]
    if TILES * K != C:
        inside = inside & (columns < C)
    return columns, inside


@triton.jit
def _load(x, rows, is_row, stride, i: tl.constexpr, C: tl.constexpr, K: tl.constexpr):
    """Tile i of each row; zeros outside."""
    columns, inside = _columns_of(i, is_row, C, K)
    return tl.load(x + rows[:, None] * stride + columns, mask=inside, other=0.0)


@triton.jit
def _load_row(x, i: tl.constexpr, C: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr):
    """Tile i of one row, for each row, in the layout of a tile: 16 bytes a thread, the same for all
    rows of a warp."""
    columns = tl.broadcast_to((i * K + tl.arange(0, K))[None, :], (ROWS, K))
    if TILES * K != C:
        return tl.load(x + columns, mask=columns < C, other=0.0).to(tl.float32)
    return tl.load(x + columns).to(tl.float32)


@triton.jit
def _store(x, value, rows, is_row, i: tl.constexpr, C: tl.constexpr, K: tl.constexpr):
    columns, inside = _columns_of(i, is_row, C, K)
    tl.store(x + rows[:, None] * C + columns, value, mask=inside)


@triton.jit
def layer_norm_forward_kernel(
    x,
    residual,
    weight,
    bias,
    y,
    summed,
    mean,
    rstd,
    amax,
    M,
    stride,
    residual_stride,
    eps,
    C: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows, is_row = _rows_of(tl.program_id(0) * ROWS, M, ROWS)
    tiles = ()
    sums = tl.zeros((ROWS, K), tl.float32)
    for i in tl.static_range(TILES):
        tile = _load(x, rows, is_row, stride, i, C, K).to(tl.float32)
        if residual is not None:
            tile += _load(residual, rows, is_row, residual_stride, i, C, K).to(tl.float32)
            # The norm is of what backward will read.
            tile = tile.to(summed.dtype.element_ty).to(tl.float32)
        tiles = _with(tiles, tile)
        sums += tile
    centre = tl.sum(sums, 1) / C
    squares = tl.zeros((ROWS, K), tl.float32)
    for i in tl.static_range(TILES):
        centred = tiles[i] - centre[:, None]
        if TILES * K != C:
            centred = tl.where(_columns_of(i, is_row, C, K)[1], centred, 0.0)
        squares += centred * centred
    scale = 1.0 / tl.sqrt_rn(tl.sum(squares, 1) / C + eps)
    results = ()
    peaks = tl.zeros((ROWS, K), tl.float32)
    for i in tl.static_range(TILES):
        normal = (tiles[i] - centre[:, None]) * scale[:, None]
        result = normal * _load_row(weight, i, C, K, ROWS) + _load_row(bias, i, C, K, ROWS)
        if y is not None:
            results = _with(results, result)
        if amax is not None:
            peaks = tl.maximum(peaks, tl.where(is_row[:, None], tl.abs(result), 0.0))
    # Stores come last: no load is moved up past one.
    for i in tl.static_range(TILES):
        if residual is not None:
            _store(summed, tiles[i], rows, is_row, i, C, K)
        if y is not None:
            _store(y, results[i], rows, is_row, i, C, K)
    tl.store(mean + rows, centre, mask=is_row)  # narrow: one number a row
    tl.store(rstd + rows, scale, mask=is_row)  # narrow: one number a row
    if amax is not None:
        # Bits of numbers without sign are in the order of the numbers, and a maximum has no order.
        tl.atomic_max(amax, tl.max(peaks.to(tl.int32, bitcast=True)))


@triton.jit
def layer_norm_backward_kernel(
    summed,
    weight,
    mean,
    rstd,
    dy,
    dsummed,
    dx,
    partials,
    M,
    stride,
    C: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
):
    zeros = tl.zeros((ROWS, K), tl.float32)
    dweight = ()
    dbias = ()
    for _ in tl.static_range(TILES):
        dweight = _with(dweight, zeros)
        dbias = _with(dbias, zeros)
    for start in tl.range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS):
        rows, is_row = _rows_of(start, M, ROWS)
        centre = tl.load(mean + rows, mask=is_row, other=0.0)[:, None]  # narrow: one number a row
        scale = tl.load(rstd + rows, mask=is_row, other=0.0)[:, None]  # narrow: one number a row
        handed_on = ()
        normals = ()
        slopes = ()
        dweight_next = ()
        dbias_next = ()
        along_one = zeros
        along_normal = zeros
        for i in tl.static_range(TILES):
            grad = _load(dy, rows, is_row, C, i, C, K).to(tl.float32)
            normal = (_load(summed, rows, is_row, stride, i, C, K).to(tl.float32) - centre) * scale
            slope = grad * _load_row(weight, i, C, K, ROWS)
            if dsummed is not None:
                handed_on = _with(handed_on, _load(dsummed, rows, is_row, C, i, C, K))
            along_one += slope
            along_normal += slope * normal
            normals = _with(normals, normal)
            slopes = _with(slopes, slope)
            dweight_next = _with(dweight_next, dweight[i] + grad * normal)
            dbias_next = _with(dbias_next, dbias[i] + grad)
        dweight = dweight_next
        dbias = dbias_next
        mean_slope = (tl.sum(along_one, 1) / C)[:, None]
        mean_product = (tl.sum(along_normal, 1) / C)[:, None]
        for i in tl.static_range(TILES):
            result = (slopes[i] - mean_slope - normals[i] * mean_product) * scale
            if dsummed is not None:
                result += handed_on[i].to(tl.float32)
            _store(dx, result, rows, is_row, i, C, K)
    row = partials + tl.program_id(0) * (2 * C)
    for i in tl.static_range(TILES):
        columns = i * K + tl.arange(0, K)
        tl.store(row + columns, tl.sum(dweight[i], 0), mask=columns < C)  # narrow: once a program
        tl.store(row + C + columns, tl.sum(dbias[i], 0), mask=columns < C)  # narrow: once a program


def _rows(x: torch.Tensor) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _tiling(C: int) -> dict[str, int]:
    K = max(16, triton.next_power_of_2(triton.cdiv(C, TILES.value)))
    return {"C": C, "K": K, "ROWS": max(1, ELEMENTS // K)}


@torch.library.custom_op("sd_kernels::layer_norm_forward", mutates_args=())
def layer_norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y, sum (empty without a residual: it would be x), and float32 mean and 1 / deviation of each
    row."""
    y = empty(x, tuple(x.shape))
    others = _forward(x, weight, bias, residual, eps, y=y)
    return rounded(y, x.dtype), *others


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    y: torch.Tensor | None = None,
    amax: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sum, mean and 1 / deviation; the norm is written into y, and the bits of its largest
    magnitude into amax."""
    rows, added = _rows(x), None if residual is None else _rows(residual)
    (M, C), tiling = rows.shape, _tiling(x.shape[-1])
    summed = empty(x, (0,) if added is None else tuple(x.shape))
    mean, rstd = (empty(x, (M,), torch.float32) for _ in range(2))
    arguments = rows, added, weight.contiguous(), bias.contiguous(), y, summed, mean, rstd, amax
    strides = rows.stride(0), C if added is None else added.stride(0)
    launch(
        layer_norm_forward_kernel,
        (triton.cdiv(M, tiling["ROWS"]),),
        *arguments,
        M,
        *strides,
        eps,
        **tiling,
    )
    return rounded(summed, x.dtype), mean, rstd


@torch.library.custom_op("sd_kernels::layer_norm_statistics", mutates_args=())
def layer_norm_statistics(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `layer_norm_forward` without the norm itself; instead the bits () int32 of its largest
    magnitude, for FP8."""
    amax = torch.zeros((), dtype=torch.int32, device=x.device)
    return *_forward(x, weight, bias, residual, eps, amax=amax), amax


@layer_norm_statistics.register_fake
def _(x, weight, bias, residual, eps):
    mean, rstd = (x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32) for _ in range(2))
    return (
        x.new_empty(0 if residual is None else x.shape),
        mean,
        rstd,
        x.new_empty((), dtype=torch.int32),
    )


@torch.library.custom_op("sd_kernels::layer_norm_backward", mutates_args=())
def layer_norm_backward(
    summed: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dy: torch.Tensor,
    dsummed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x (and of residual), and of weight and bias (2, C)."""
    rows = _rows(summed)
    (M, C), tiling = rows.shape, _tiling(summed.shape[-1])
    programs = min(triton.cdiv(M, tiling["ROWS"]), BACKWARD_PER_PROCESSOR * processors(summed))
    dx = empty(summed, tuple(summed.shape))
    partials = empty(summed, (programs, 2 * C), torch.float32)
    grads = dy.contiguous(), None if dsummed is None else dsummed.contiguous()
    arguments = rows, weight.contiguous(), mean, rstd, *grads, dx, partials
    launch(layer_norm_backward_kernel, (programs,), *arguments, M, rows.stride(0), **tiling)
    return rounded(dx, summed.dtype), column_sum(partials, weight.dtype).view(2, C)


@layer_norm_forward.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    M = x.numel() // x.shape[-1]
    mean, rstd = (x.new_empty(M, dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape), mean, rstd


@layer_norm_backward.register_fake
def _(
    summed: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dy: torch.Tensor,
    dsummed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return summed.new_empty(summed.shape), weight.new_empty(2, summed.shape[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    (x, weight, _, residual, _), (_, summed, mean, rstd) = inputs, output
    # Else zeros are written for what has no gradient: mean and deviation, always.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if residual is None else summed, weight, mean, rstd)


def _backward(
    ctx: Any, dy: torch.Tensor | None, dsummed: torch.Tensor | None, *_: Any
) -> tuple[torch.Tensor | None, ...]:
    summed, weight, mean, rstd = ctx.saved_tensors
    dy = torch.zeros_like(summed) if dy is None else dy
    dsummed = dsummed if dsummed is not None and dsummed.shape == summed.shape else None
    dx, (dweight, dbias) = layer_norm_backward(summed, weight, mean, rstd, dy, dsummed)
    return dx, dweight, dbias, dx if ctx.needs_input_grad[3] else None, None


layer_norm_forward.register_autograd(_backward, setup_context=_save)


class _HandingOn(torch.autograd.Function):
    """Hands x itself on, which a registered op may not.

    So the gradient of x's later uses comes into the backward pass, instead of being added in a pass
    of its own.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        output = layer_norm_forward(*inputs)
        _save(ctx, inputs, output)
        return output[0], inputs[0]

    backward = staticmethod(_backward)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.layer_norm`; float32, bfloat16 or float16. Gradients of both outputs meet in
    one pass."""
    check(x, weight, bias, residual)
    require(
        x.shape[-1] <= WIDEST,
        "layer_norm",
        f"shape {tuple(x.shape)}",
        f"a last axis of at most {WIDEST}",
    )
    if residual is None:
        return _HandingOn.apply(x, weight, bias, None, eps)
    return layer_norm_forward(x, weight, bias, residual, eps)[:2]
