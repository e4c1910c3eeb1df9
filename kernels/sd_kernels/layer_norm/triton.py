"""LayerNorm of a residual sum in one pass over device memory each way.

Forward reads x and residual and writes their sum and its norm. Backward reads the sum and the
gradients of both outputs, and writes one gradient, which is that of x and of residual. Each program
of the backward pass keeps the gradients of all vectors (C,) for its stripe of rows; `column_sum`
adds the stripes in a fixed order.

All widths of the UNet are 5 * 2^k, so forward a row is five tiles of K columns: no idle lanes, five
independent 16-byte loads for each thread and tensor, and one reduction across lanes for all five.
Backward a row is one tile of a power of two, with three of eight lanes idle, since for five tiles
the sums of four vectors would not fit into the registers.

Shape letters: M rows (all leading axes), C columns, K columns of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from sd_kernels.column_sum import column_sum, processors
from sd_kernels.errors import require
from sd_kernels.launch import empty, launch, rounded
from sd_kernels.layer_norm.checks import check


@dataclass(frozen=True)
class Tuning:
    """Launch constants."""

    tiles: int = 5
    """tiles of a row: the UNet's widths are 320, 640 and 1280"""
    elements: int = 1024
    """elements of a tile, of one row or of several: 4 warps have 8 a thread, 16 bytes in bfloat16;
    a row of up to 1280 columns then lies in one warp, and is summed without shared memory"""
    backward_elements: int = 2048
    """elements of a tile of the backward pass, of one row or of several: 4 warps have 16 a thread,
    so that the sums of four vectors take 64 registers"""
    backward_per_processor: int = 3
    """programs of the backward pass on a multiprocessor: 128 threads with up to 168 registers each
    fill its 65,536 registers"""


TUNING = Tuning()
TILES = tl.constexpr(TUNING.tiles)
WIDEST = TUNING.tiles * TUNING.elements
"""columns of the widest row: one row a program"""


@triton.jit
def _appended(tiles, tile):
    return tiles + (tile,)  # noqa: RUF005 (Triton knows no starred tuples)


@triton.jit
def _rows_of(start, M, ROWS: tl.constexpr):
    """Numbers of ROWS rows from `start` on, and which of them exist."""
    rows = start + tl.arange(0, ROWS).to(tl.int64)
    return rows, rows < M


@triton.jit
def _columns_of(i: tl.constexpr, is_row, C: tl.constexpr, K: tl.constexpr):
    """Columns (1, K) of tile i, and which elements are inside the tensor."""
    columns = (i * K + tl.arange(0, K))[None, :]
    inside = is_row[:, None]
    # Only ragged widths pay for a mask of columns, which would split the 16-byte accesses.
    if TILES * K != C:
        inside = inside & (columns < C)
    return columns, inside


@triton.jit
def _load(x, rows, is_row, stride, i: tl.constexpr, C: tl.constexpr, K: tl.constexpr):
    """Tile i of each row (ROWS, K), zero outside."""
    columns, inside = _columns_of(i, is_row, C, K)
    return tl.load(x + rows[:, None] * stride + columns, mask=inside, other=0.0)


@triton.jit
def _load_row(x, i: tl.constexpr, C: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr):
    """Tile i of a vector (C,), the same for each row: (ROWS, K) in float32."""
    # Broadcast addresses, not the loaded values: the load then has the layout of a tile, 16 bytes a
    # thread, where a vector of K columns would be loaded by few bytes and laid out anew.
    columns = tl.broadcast_to((i * K + tl.arange(0, K))[None, :], (ROWS, K))
    if TILES * K != C:
        return tl.load(x + columns, mask=columns < C, other=0.0).to(tl.float32)
    return tl.load(x + columns).to(tl.float32)


@triton.jit
def _store(x, value, rows, is_row, i: tl.constexpr, C: tl.constexpr, K: tl.constexpr):
    """Tile i of each row of a dense tensor."""
    columns, inside = _columns_of(i, is_row, C, K)
    tl.store(x + rows[:, None] * C + columns, value, mask=inside)


@triton.jit
def _summed_rows(
    x, residual, summed, rows, is_row, stride, residual_stride, eps,
    C: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The sum x + residual, rounded to the dtype of `summed`, its mean and 1 / deviation.

    The sum is a tuple of tiles (ROWS, K) in float32, the statistics are (ROWS,).
    """
    tiles = ()
    sums = tl.zeros((ROWS, K), tl.float32)
    for i in tl.static_range(TILES):
        tile = _load(x, rows, is_row, stride, i, C, K).to(tl.float32)
        if residual is not None:
            tile += _load(residual, rows, is_row, residual_stride, i, C, K).to(tl.float32)
            # Normalise the rounded sum: it is what backward and the next residual read.
            tile = tile.to(summed.dtype.element_ty).to(tl.float32)
        tiles = _appended(tiles, tile)
        # Tiles are added lane by lane; lanes are added once, after the loop.
        sums += tile
    row_mean = tl.sum(sums, 1) / C
    # The variance takes a second pass over registers: E[x^2] - E[x]^2 would cancel where the mean
    # is far from zero.
    squares = tl.zeros((ROWS, K), tl.float32)
    for i in tl.static_range(TILES):
        centred = tiles[i] - row_mean[:, None]
        if TILES * K != C:
            # Columns outside hold 0, not the mean, and must not add to the variance.
            centred = tl.where(_columns_of(i, is_row, C, K)[1], centred, 0.0)
        squares += centred * centred
    row_rstd = 1.0 / tl.sqrt_rn(tl.sum(squares, 1) / C + eps)
    return tiles, row_mean, row_rstd


@triton.jit
def layer_norm_forward_kernel(
    x, residual, weight, bias, y, summed, mean, rstd, amax, M, stride, residual_stride, eps,
    C: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    rows, is_row = _rows_of(tl.program_id(0) * ROWS, M, ROWS)
    tiles, row_mean, row_rstd = _summed_rows(
        x, residual, summed, rows, is_row, stride, residual_stride, eps, C, K, ROWS
    )
    results = ()
    magnitudes = tl.zeros((ROWS, K), tl.float32)
    for i in tl.static_range(TILES):
        # Ba, Kiros and Hinton, "Layer Normalization" (2016), section 3.
        normalised = (tiles[i] - row_mean[:, None]) * row_rstd[:, None]
        result = normalised * _load_row(weight, i, C, K, ROWS) + _load_row(bias, i, C, K, ROWS)
        if y is not None:
            results = _appended(results, result)
        if amax is not None:
            # Rows outside hold the bias.
            magnitudes = tl.maximum(magnitudes, tl.where(is_row[:, None], tl.abs(result), 0.0))
    # Stores come last: the compiler moves no load up past a store, which may write what it reads.
    for i in tl.static_range(TILES):
        if residual is not None:
            _store(summed, tiles[i], rows, is_row, i, C, K)
        if y is not None:
            _store(y, results[i], rows, is_row, i, C, K)
    tl.store(mean + rows, row_mean, mask=is_row)  # narrow: one number a row
    tl.store(rstd + rows, row_rstd, mask=is_row)  # narrow: one number a row
    if amax is not None:
        # The bits of IEEE floats without sign have the order of the numbers, so an integer atomic
        # will do; a maximum does not depend on the order of the programs.
        tl.atomic_max(amax, tl.max(magnitudes.to(tl.int32, bitcast=True)))


@triton.jit
def layer_norm_backward_kernel(
    summed, weight, mean, rstd, dy, dsummed, dx, partials, M, stride, C: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, X_BIAS: tl.constexpr, LATER_BIAS: tl.constexpr,
):  # fmt: skip
    SUMS: tl.constexpr = 2 + X_BIAS + LATER_BIAS
    columns = tl.arange(0, WIDTH)[None, :]
    # Broadcast addresses, as in `_load_row`.
    everywhere = tl.broadcast_to(columns, (ROWS, WIDTH))
    scale = tl.load(weight + everywhere, mask=everywhere < C, other=0.0).to(tl.float32)
    # Each row of the tile has sums of its own, which are added across threads once, at the end.
    dweight = tl.zeros((ROWS, WIDTH), tl.float32)
    dbias = tl.zeros((ROWS, WIDTH), tl.float32)
    dx_sums = tl.zeros((ROWS, WIDTH), tl.float32)
    dsummed_sums = tl.zeros((ROWS, WIDTH), tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS):
        rows, is_row = _rows_of(start, M, ROWS)
        inside = is_row[:, None] & (columns < C)
        # All loads come before the first use, so that all are in flight. Outside the tensor
        # gradients are zero and add nothing.
        raw_grad = tl.load(dy + rows[:, None] * C + columns, mask=inside, other=0.0)
        raw = tl.load(summed + rows[:, None] * stride + columns, mask=inside, other=0.0)
        if dsummed is not None:
            later = tl.load(dsummed + rows[:, None] * C + columns, mask=inside, other=0.0)
        row_mean = tl.load(mean + rows, mask=is_row, other=0.0)[:, None]  # narrow: one a row
        row_rstd = tl.load(rstd + rows, mask=is_row, other=0.0)[:, None]  # narrow: one a row
        grad = raw_grad.to(tl.float32)
        normalised = (raw.to(tl.float32) - row_mean) * row_rstd
        dweight += grad * normalised
        dbias += grad
        # dx = rstd * (w dy - mean(w dy) - v mean(w dy v)), v normalised (the derivation is that of
        # Ioffe and Szegedy, "Batch Normalization", 2015, section 3).
        grad *= scale
        mean_grad = (tl.sum(grad, 1) / C)[:, None]
        mean_product = (tl.sum(grad * normalised, 1) / C)[:, None]
        result = (grad - mean_grad - normalised * mean_product) * row_rstd
        if dsummed is not None:
            result += later.to(tl.float32)
            if LATER_BIAS:
                dsummed_sums += later.to(tl.float32)
        tl.store(dx + rows[:, None] * C + columns, result, mask=inside)
        if X_BIAS:
            # Rows outside have a deviation of zero; columns outside have sums that nobody stores.
            dx_sums += result
    column = tl.arange(0, WIDTH)
    partial, is_column = partials + tl.program_id(0) * (SUMS * C) + column, column < C
    tl.store(partial, tl.sum(dweight, 0), mask=is_column)  # narrow: once a program
    tl.store(partial + C, tl.sum(dbias, 0), mask=is_column)  # narrow: once a program
    if X_BIAS:
        tl.store(partial + 2 * C, tl.sum(dx_sums, 0), mask=is_column)  # narrow: once a program
    if LATER_BIAS:
        last = partial + (SUMS - 1) * C
        tl.store(last, tl.sum(dsummed_sums, 0), mask=is_column)  # narrow: once a program


def _rows(x: torch.Tensor) -> torch.Tensor:
    """x (..., C) as rows (M, C) of adjacent elements; rows may be apart."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def _tiling(C: int) -> dict[str, int]:
    """Compile-time sizes for rows of C columns; narrow rows share a program."""
    # At least 16 columns, 32 bytes of bfloat16: device memory moves in sectors of 32 bytes.
    K = max(16, triton.next_power_of_2(triton.cdiv(C, TUNING.tiles)))
    return {"C": C, "K": K, "ROWS": max(1, TUNING.elements // K)}


@torch.library.custom_op("sd_kernels::layer_norm_forward", mutates_args=())
def layer_norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    later_bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y (..., C), the sum (..., C), and float32 mean and 1 / deviation (M,) of each row.

    Without a residual the sum is empty: it would be x, which a registered op may not return. The
    last two vectors are there for their gradients alone.
    """
    y = empty(x, tuple(x.shape))
    statistics = _forward(x, weight, bias, residual, eps, y=y)
    return rounded(y, x.dtype), *statistics


def _forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    y: torch.Tensor | None = None,
    amax: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum, mean and 1 / deviation.

    Writes the norm into `y` and the bits of its largest magnitude into `amax`, where given.
    """
    rows, residual_rows = _rows(x), None if residual is None else _rows(residual)
    (M, C), tiling = rows.shape, _tiling(x.shape[-1])
    summed = empty(x, (0,) if residual_rows is None else tuple(x.shape))
    mean, rstd = (empty(x, (M,), torch.float32) for _ in range(2))
    inputs = rows, residual_rows, weight.contiguous(), bias.contiguous()
    outputs = y, summed, mean, rstd, amax
    strides = rows.stride(0), C if residual_rows is None else residual_rows.stride(0)
    grid = (triton.cdiv(M, tiling["ROWS"]),)
    launch(layer_norm_forward_kernel, grid, *inputs, *outputs, M, *strides, eps, **tiling)
    return rounded(summed, x.dtype), mean, rstd


@torch.library.custom_op("sd_kernels::layer_norm_statistics", mutates_args=())
def layer_norm_statistics(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum, mean and 1 / deviation of `layer_norm_forward`, and the largest magnitude of y.

    The latter as its bits, () int32. FP8 needs it before it can round the first number of y.
    """
    amax = torch.zeros((), dtype=torch.int32, device=x.device)
    return *_forward(x, weight, bias, residual, eps, amax=amax), amax


@torch.library.custom_op("sd_kernels::layer_norm_backward", mutates_args=())
def layer_norm_backward(
    summed: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dy: torch.Tensor,
    dsummed: torch.Tensor | None,
    x_bias: bool = False,
    later_bias: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x (and residual) (..., C), and of weight, bias and more vectors (2 to 4, C).

    These are, where asked for, the sum of dx over rows and that of dsummed, which must be there.
    """
    rows = _rows(summed)
    M, C = rows.shape
    width = max(16, triton.next_power_of_2(C))
    tile_rows = max(1, TUNING.backward_elements // width)
    resident = TUNING.backward_per_processor * processors(summed)
    programs = min(triton.cdiv(M, tile_rows), resident)
    dx = empty(summed, tuple(summed.shape))
    sums = 2 + x_bias + later_bias
    partials = empty(summed, (programs, sums * C), torch.float32)
    grads = dy.contiguous(), None if dsummed is None else dsummed.contiguous()
    arguments = rows, weight.contiguous(), mean, rstd, *grads, dx, partials
    launch(
        layer_norm_backward_kernel,
        (programs,),
        *(*arguments, M, rows.stride(0)),
        X_BIAS=x_bias,
        LATER_BIAS=later_bias,
        C=C,
        WIDTH=width,
        ROWS=tile_rows,
    )
    return rounded(dx, summed.dtype), column_sum(partials, weight.dtype).view(sums, C)


@layer_norm_forward.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    later_bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    M = x.numel() // x.shape[-1]
    mean, rstd = (x.new_empty(M, dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape), mean, rstd


@layer_norm_statistics.register_fake
def _(x, weight, bias, residual, eps):
    mean, rstd = (x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32) for _ in range(2))
    summed = x.new_empty(0 if residual is None else x.shape)
    return summed, mean, rstd, x.new_empty((), dtype=torch.int32)


@layer_norm_backward.register_fake
def _(
    summed: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    dy: torch.Tensor,
    dsummed: torch.Tensor | None,
    x_bias: bool = False,
    later_bias: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    sums = 2 + x_bias + later_bias
    return summed.new_empty(summed.shape), weight.new_empty(sums, summed.shape[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    (x, weight, _, residual, *_), (_, summed, mean, rstd) = inputs, output
    # Otherwise zeros are written for outputs without a gradient: mean and rstd, always.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x if residual is None else summed, weight, mean, rstd)


def _backward(
    ctx: Any, dy: torch.Tensor | None, dsummed: torch.Tensor | None, *_: Any
) -> tuple[torch.Tensor | None, ...]:
    summed, weight, mean, rstd = ctx.saved_tensors
    dy = torch.zeros_like(summed) if dy is None else dy
    # The gradient of the empty sum of a norm without a residual is no gradient of x.
    dsummed = dsummed if dsummed is not None and dsummed.shape == summed.shape else None
    needs_residual, needs_x_bias, needs_later_bias = ctx.needs_input_grad[3:6]
    sums = needs_x_bias, needs_later_bias and dsummed is not None
    dx, vectors = layer_norm_backward(summed, weight, mean, rstd, dy, dsummed, *sums)
    dweight, dbias, *others = vectors.unbind()
    dx_bias = others.pop(0) if needs_x_bias else None
    dresidual = dx if needs_residual else None
    return dx, dweight, dbias, dresidual, dx_bias, others[0] if others else None, None


layer_norm_forward.register_autograd(_backward, setup_context=_save)


class _ReturningInput(torch.autograd.Function):
    """The norm without a residual, which returns x itself as the sum.

    So the gradient of the later uses of x comes into this backward pass, and is not added in a pass
    of its own. A registered op may not return its input.
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
    x_bias: torch.Tensor | None = None,
    later_bias: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.layer_norm`; float32, bfloat16 or float16, at most `WIDEST` columns.

    The gradients of both outputs are added in the one backward pass.
    """
    check(x, weight, bias, residual, x_bias, later_bias)
    got, takes = f"shape {tuple(x.shape)}", f"a last axis of at most {WIDEST}"
    require(x.shape[-1] <= WIDEST, "layer_norm", got, takes)
    if residual is None:
        return _ReturningInput.apply(x, weight, bias, None, x_bias, later_bias, eps)
    return layer_norm_forward(x, weight, bias, residual, x_bias, later_bias, eps)[:2]
