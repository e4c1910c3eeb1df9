"""What delayed scaling makes possible: LayerNorm and GEGLU's gradient that write FP8 themselves.

Each kernel reads its inputs once, rounds its result with the scale of earlier steps, writes it both
as it is and transposed (see `quantise`), and records the largest magnitude it saw.

Shape letters: M rows, C or K columns, P rows padded to a multiple of 16 with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sd_kernels.fp8_linear.quantise import (
    _bits_of_largest,
    _saturated,
    _store_transposed,
    _tile,
    fake_outputs,
    outputs_of,
)
from sd_kernels.fp8_linear.scaling import (
    FORMATS,
    FORWARD,
    GRAD,
    GRADIENT,
    HISTORY,
    MARGIN,
    SLOTS,
    SMALLEST,
)
from sd_kernels.geglu.triton import _normal_cdf
from sd_kernels.launch import empty, launch, rounded
from sd_kernels.layer_norm.triton import (
    TILES,
    _load_row,
    _rows,
    _rows_of,
    _store,
    _summed_rows,
)


@dataclass(frozen=True)
class Tuning:
    """Launch constants."""

    norm_rows: int = 32
    """rows of a program of LayerNorm, which holds them whole: 32 bytes of a row of the transposed
    copy, the least that device memory moves"""
    norm_elements: int = 4096
    """elements of a tile at most: at 1280 columns a program has 16 rows, with 32 registers spill"""
    norm_elements_per_thread: int = 16
    """elements of a tile for each thread, 16 bytes in FP8"""
    rows: int = 64
    """rows of a tile of GEGLU's gradient"""
    columns: int = 64
    """columns of its values, and as many of its gates"""
    warps: int = 8
    """warps for such a tile: 16 values and 16 gates a thread"""
    slots: int = 128
    """slots that a program updates"""


TUNING = Tuning()


@triton.jit(do_not_specialize_on_alignment=["amax", "inverse"])
def layer_norm_quantise_kernel(
    x,
    residual,
    weight,
    bias,
    summed,
    mean,
    rstd,
    amax,
    inverse,
    numbers,
    transposed,
    M,
    P,
    stride,
    residual_stride,
    eps,
    C: tl.constexpr,
    K: tl.constexpr,
    LARGEST: tl.constexpr,
    ROWS: tl.constexpr,
):
    rows, is_row = _rows_of(tl.program_id(0) * ROWS, M, ROWS)
    tiles, row_mean, row_rstd = _summed_rows(
        x, residual, summed, rows, is_row, stride, residual_stride, eps, C, K, ROWS
    )
    scale = tl.div_rn(1.0, tl.load(inverse))  # narrow: one number
    magnitudes = tl.zeros((ROWS, K), tl.float32)
    for i in tl.static_range(TILES):
        # As in `layer_norm.triton`.
        normalised = (tiles[i] - row_mean[:, None]) * row_rstd[:, None]
        result = normalised * _load_row(weight, i, C, K, ROWS) + _load_row(bias, i, C, K, ROWS)
        # Rows outside hold the bias.
        result = tl.where(is_row[:, None], result, 0.0)
        magnitudes = tl.maximum(magnitudes, tl.abs(result), propagate_nan=tl.PropagateNan.ALL)
        value = _saturated(result * scale, LARGEST).to(numbers.dtype.element_ty)
        if residual is not None:
            _store(summed, tiles[i], rows, is_row, i, C, K)
        _store(numbers, value, rows, is_row, i, C, K)
        _store_transposed(transposed, value, rows, i * K + tl.arange(0, K), P, C)
    tl.store(mean + rows, row_mean, mask=is_row)  # narrow: one number a row
    tl.store(rstd + rows, row_rstd, mask=is_row)  # narrow: one number a row
    tl.atomic_max(amax, _bits_of_largest(magnitudes))


@torch.library.custom_op("sd_kernels::fp8_layer_norm", mutates_args=("amax",))
def fp8_layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    eps: float,
    inverse: torch.Tensor,
    amax: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The normalised sum in E4M3 (M, C), its transpose (C, P), the sum, mean and 1 / deviation.

    x and residual are (M, C), weight and bias (C,); the sum (M, C) is empty without a residual,
    mean and 1 / deviation are (M,) float32. `inverse` and `amax` as for `fp8_quantise_delayed`.
    """
    M, C = x.shape
    K = max(16, triton.next_power_of_2(triton.cdiv(C, TILES.value)))
    rows = max(1, min(TUNING.norm_rows, TUNING.norm_elements // K))
    warps = max(1, rows * K // (32 * TUNING.norm_elements_per_thread))
    options = {"C": C, "K": K, "ROWS": rows, "LARGEST": FORMATS[FORWARD], "num_warps": warps}
    x, residual = _rows(x), None if residual is None else _rows(residual)
    summed = empty(x, (0,) if residual is None else (M, C))
    mean, rstd = (empty(x, (M,), torch.float32) for _ in range(2))
    numbers, transposed = outputs_of(x, M, C, FORWARD)
    scales = amax.view(torch.int32), inverse
    tensors = x, residual, weight.contiguous(), bias.contiguous(), summed, mean, rstd, *scales
    strides = x.stride(0), C if residual is None else residual.stride(0)
    sizes = M, transposed.shape[1], *strides, eps
    # Rows of the grid cover P, not M: the padding is written too.
    grid = (triton.cdiv(transposed.shape[1], rows),)
    launch(layer_norm_quantise_kernel, grid, *tensors, numbers, transposed, *sizes, **options)
    statistics = rounded(summed, x.dtype), mean, rstd
    return rounded(numbers, FORWARD), rounded(transposed, FORWARD), *statistics


@fp8_layer_norm.register_fake
def _(x, weight, bias, residual, eps, inverse, amax):
    M, C = x.shape
    mean, rstd = (x.new_empty(M, dtype=torch.float32) for _ in range(2))
    summed = x.new_empty(0 if residual is None else (M, C))
    return *fake_outputs(x, M, C, FORWARD), summed, mean, rstd


@triton.jit(do_not_specialize_on_alignment=["amax", "inverse"])
def geglu_backward_quantise_kernel(
    x,
    dy,
    amax,
    inverse,
    numbers,
    transposed,
    sums,
    M,
    P,
    stride,
    K: tl.constexpr,
    LARGEST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows, columns, inside = _tile(M, K, ROWS, COLUMNS)
    place = x + rows[:, None] * stride + columns[None, :]
    value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(place + K, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(dy + rows[:, None] * K + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    # As in `geglu.triton`.
    cdf = _normal_cdf(gate)
    slope = cdf + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    dvalue = grad * (gate * cdf)
    dgate = grad * (value * slope)
    magnitudes = tl.maximum(tl.abs(dvalue), tl.abs(dgate), propagate_nan=tl.PropagateNan.ALL)
    tl.atomic_max(amax, _bits_of_largest(magnitudes))
    if sums is not None:
        place = sums + tl.program_id(0).to(tl.int64) * (2 * K) + columns
        tl.store(place, tl.sum(dvalue, 0), mask=columns < K)  # narrow: one row a program
        tl.store(place + K, tl.sum(dgate, 0), mask=columns < K)  # narrow: one row a program
    scale = tl.div_rn(1.0, tl.load(inverse))  # narrow: one number
    dvalue = _saturated(dvalue * scale, LARGEST).to(numbers.dtype.element_ty)
    dgate = _saturated(dgate * scale, LARGEST).to(numbers.dtype.element_ty)
    place = numbers + rows[:, None] * (2 * K) + columns[None, :]
    tl.store(place, dvalue, mask=inside)
    tl.store(place + K, dgate, mask=inside)
    _store_transposed(transposed, dvalue, rows, columns, P, K)
    _store_transposed(transposed + K * P.to(tl.int64), dgate, rows, columns, P, K)


@torch.library.custom_op("sd_kernels::fp8_geglu_backward", mutates_args=("amax",))
def fp8_geglu_backward(
    x: torch.Tensor,
    dy: torch.Tensor,
    inverse: torch.Tensor,
    amax: torch.Tensor,
    with_sums: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient of GEGLU's x (M, 2K) in E5M2, its transpose (2K, P), and sums (S, 2K) over rows.

    dy is (M, K); `inverse`, `amax` and the sums are as for `fp8_quantise_delayed`.
    """
    M, K = dy.shape
    numbers, transposed = outputs_of(x, M, 2 * K, GRADIENT)
    P = transposed.shape[1]
    grid = triton.cdiv(P, TUNING.rows), triton.cdiv(K, TUNING.columns)
    sums = empty(x, (grid[0] if with_sums else 0, 2 * K), torch.float32)
    tensors = x, dy.contiguous(), amax.view(torch.int32), inverse, numbers, transposed
    tile = {"ROWS": TUNING.rows, "COLUMNS": TUNING.columns, "num_warps": TUNING.warps}
    options = {"K": K, "LARGEST": FORMATS[GRADIENT], **tile}
    arguments = *tensors, sums if with_sums else None, M, P, x.stride(0)
    launch(geglu_backward_quantise_kernel, grid, *arguments, **options)
    return rounded(numbers, GRADIENT), rounded(transposed, GRADIENT), sums


@fp8_geglu_backward.register_fake
def _(x, dy, inverse, amax, with_sums):
    M, K = dy.shape
    blocks = (M + 15) // 16 * 16
    sums = (-(-blocks // TUNING.rows) if with_sums else 0, 2 * K)
    return *fake_outputs(x, M, 2 * K, GRADIENT), x.new_empty(sums, dtype=torch.float32)


@triton.jit
def update_scales_kernel(
    amax,
    inverse,
    history,
    slots,
    HISTORY: tl.constexpr,
    SLOTS: tl.constexpr,
    GRAD: tl.constexpr,
    FORWARD_LARGEST: tl.constexpr,
    GRADIENT_LARGEST: tl.constexpr,
    FACTOR: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = slot < slots
    newest = tl.load(amax + slot, mask=inside, other=0.0)  # narrow: one number a slot
    largest = newest
    # From the oldest on: a thread moves the rows of its own slots down by one.
    for age in tl.static_range(HISTORY - 1):
        place = history + (HISTORY - 2 - age) * slots + slot
        older = tl.load(place, mask=inside, other=0.0)  # narrow: one number a slot
        tl.store(place + slots, older, mask=inside)  # narrow: one number a slot
        largest = tl.maximum(largest, older, propagate_nan=tl.PropagateNan.ALL)
    tl.store(history + slot, newest, mask=inside)  # narrow: one number a slot
    limit = tl.where(slot % SLOTS == GRAD, GRADIENT_LARGEST, FORWARD_LARGEST)
    wanted = tl.maximum(tl.div_rn(largest * FACTOR, limit), SMALLEST)
    # The comparison is false for NaN.
    known = (largest > 0.0) & (largest < float("inf"))
    before = tl.load(inverse + slot, mask=inside, other=1.0)  # narrow: one number a slot
    tl.store(inverse + slot, tl.where(known, wanted, before), mask=inside)  # narrow: one a slot
    tl.store(amax + slot, tl.zeros((BLOCK,), tl.float32), mask=inside)  # narrow: one a slot


@torch.library.custom_op(
    "sd_kernels::fp8_update_scales", mutates_args=("amax", "inverse", "history")
)
def fp8_update_scales(amax: torch.Tensor, inverse: torch.Tensor, history: torch.Tensor) -> None:
    """`scaling.update_scales` in one launch."""
    slots = len(amax)
    launch(
        update_scales_kernel,
        (triton.cdiv(slots, TUNING.slots),),
        amax,
        inverse,
        history,
        slots,
        HISTORY=HISTORY,
        SLOTS=SLOTS,
        GRAD=GRAD,
        FORWARD_LARGEST=FORMATS[FORWARD],
        GRADIENT_LARGEST=FORMATS[GRADIENT],
        FACTOR=2.0**MARGIN,
        SMALLEST=SMALLEST,
        BLOCK=TUNING.slots,
    )


@fp8_update_scales.register_fake
def _(amax, inverse, history):
    return None
