"""LayerNorm of a residual sum in one pass over device memory each way.

Forward reads x and residual and writes their sum and its norm. Backward reads the sum and the
gradients of both outputs, and writes one gradient, which is that of x and of residual. Each program
of the backward pass keeps the gradients of weight and bias of its stripe of rows; `column_sum` adds
the stripes in a fixed order.

All widths of the UNet are 5 * 2^k, so a row is five tiles of K columns: no idle lanes, five
independent 16-byte loads for each thread and tensor, and one reduction across lanes for all five.

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
    backward_per_processor: int = 2
    """programs of the backward pass on a multiprocessor: 128 threads with 255 registers each, for 2
    x 5 tiles of sums, fill half of its 65,536 registers"""


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
    summed, weight, mean, rstd, dy, dsummed, dx, partials, M, stride,
    C: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    zeros = tl.zeros((ROWS, K), tl.float32)
    dweight = ()
    dbias = ()
    for _ in tl.static_range(TILES):
        dweight = _appended(dweight, zeros)
        dbias = _appended(dbias, zeros)
    for start in tl.range(tl.program_id(0) * ROWS, M, tl.num_programs(0) * ROWS):
        rows, is_row = _rows_of(start, M, ROWS)
        row_mean = tl.load(mean + rows, mask=is_row, other=0.0)[:, None]  # narrow: one a row
        row_rstd = tl.load(rstd + rows, mask=is_row, other=0.0)[:, None]  # narrow: one a row
        dsummed_tiles = ()
        normalised_tiles = ()
        dnormalised_tiles = ()
        # Triton cannot assign to an element of a tuple: sums of this turn make new tuples.
        dweight_next = ()
        dbias_next = ()
        dnormalised_sums = zeros
        product_sums = zeros
        for i in tl.static_range(TILES):
            # Rows and columns outside have a gradient of zero and add nothing.
            grad = _load(dy, rows, is_row, C, i, C, K).to(tl.float32)
            tile = _load(summed, rows, is_row, stride, i, C, K).to(tl.float32)
            normalised = (tile - row_mean) * row_rstd
            dnormalised = grad * _load_row(weight, i, C, K, ROWS)
            if dsummed is not None:
                # Read here, beside the other loads, and kept as read: half the registers.
                dsummed_tiles = _appended(dsummed_tiles, _load(dsummed, rows, is_row, C, i, C, K))
            dnormalised_sums += dnormalised
            product_sums += dnormalised * normalised
            normalised_tiles = _appended(normalised_tiles, normalised)
            dnormalised_tiles = _appended(dnormalised_tiles, dnormalised)
            dweight_next = _appended(dweight_next, dweight[i] + grad * normalised)
            dbias_next = _appended(dbias_next, dbias[i] + grad)
        dweight = dweight_next
        dbias = dbias_next
        mean_dnormalised = (tl.sum(dnormalised_sums, 1) / C)[:, None]
        mean_product = (tl.sum(product_sums, 1) / C)[:, None]
        for i in tl.static_range(TILES):
            # dx = rstd * (w dy - mean(w dy) - v mean(w dy v)), v normalised (the derivation is that
            # of Ioffe and Szegedy, "Batch Normalization", 2015, section 3).
            result = dnormalised_tiles[i] - mean_dnormalised - normalised_tiles[i] * mean_product
            result *= row_rstd
            if dsummed is not None:
                result += dsummed_tiles[i].to(tl.float32)
            _store(dx, result, rows, is_row, i, C, K)
    partial = partials + tl.program_id(0) * (2 * C)
    for i in tl.static_range(TILES):
        columns = i * K + tl.arange(0, K)
        is_column = columns < C
        tl.store(partial + columns, tl.sum(dweight[i], 0), mask=is_column)  # narrow: once a program
        tl.store(partial + C + columns, tl.sum(dbias[i], 0), mask=is_column)  # narrow: likewise


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
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y (..., C), the sum (..., C), and float32 mean and 1 / deviation (M,) of each row.

    Without a residual the sum is empty: it would be x, which a registered op may not return.
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x (and residual) (..., C), and of weight and bias (2, C)."""
    rows = _rows(summed)
    (M, C), tiling = rows.shape, _tiling(summed.shape[-1])
    resident = TUNING.backward_per_processor * processors(summed)
    programs = min(triton.cdiv(M, tiling["ROWS"]), resident)
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
) -> tuple[torch.Tensor, torch.Tensor]:
    return summed.new_empty(summed.shape), weight.new_empty(2, summed.shape[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    (x, weight, _, residual, _), (_, summed, mean, rstd) = inputs, output
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
    dx, (dweight, dbias) = layer_norm_backward(summed, weight, mean, rstd, dy, dsummed)
    return dx, dweight, dbias, dx if ctx.needs_input_grad[3] else None, None


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
    *,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.layer_norm`; float32, bfloat16 or float16, at most `WIDEST` columns.

    The gradients of both outputs are added in the one backward pass.
    """
    check(x, weight, bias, residual)
    got, takes = f"shape {tuple(x.shape)}", f"a last axis of at most {WIDEST}"
    require(x.shape[-1] <= WIDEST, "layer_norm", got, takes)
    if residual is None:
        return _ReturningInput.apply(x, weight, bias, None, eps)
    return layer_norm_forward(x, weight, bias, residual, eps)[:2]
