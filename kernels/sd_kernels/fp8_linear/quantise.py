"""Rounding to FP8, fused with the GEGLU or LayerNorm that makes the numbers.

Current scaling needs the largest magnitude before it can round the first number, so there are two
sweeps. The first reads the inputs and keeps the largest magnitude of the numbers made of them. The
second reads the inputs again and writes the numbers in FP8. Both compute GEGLU or LayerNorm, whose
result never exists in 16 bits. For GEGLU this moves 10 bytes a number; writing 16 bits first would
move as many and keep two more until the backward pass. For LayerNorm it moves 6 bytes, not 8.

With delayed scaling the scale is known, and one sweep rounds and records the largest magnitude: 6
bytes a number for GEGLU. `delayed` has what is fused with LayerNorm and with GEGLU's gradient.

The matrix units of Hopper take FP8 operands with the summed axis contiguous (PTX ISA, wgmma: only
operands K-major for 8-bit types). The gradient of the weights sums over rows, so each tile is
written both as it is and transposed; no further pass is needed for the transposed copy.

Shape letters: M rows, K columns, P rows padded to a multiple of 16 (with zeros, which add nothing
to a sum).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from sd_kernels.fp8_linear.scaling import FORMATS
from sd_kernels.geglu.triton import _normal_cdf
from sd_kernels.launch import empty, launch, rounded


@dataclass(frozen=True)
class Tuning:
    """Launch constants."""

    rows: int = 128
    """rows of a tile: 128 bytes, a whole cache line, of a row of the transposed copy"""
    columns: int = 64
    """columns of a tile: all widths of the UNet are multiples, so that no lane is idle"""
    warps: int = 8
    """warps of a program: 32 elements a thread, of which the transpose keeps two layouts"""


TUNING = Tuning()


@triton.jit
def _tile(M, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows (ROWS,) and columns (COLUMNS,) of a program, and which elements are inside."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < M)[:, None]
    # Only ragged widths pay for a mask of columns, which would split the 16-byte accesses.
    if K % COLUMNS != 0:
        inside = inside & (columns < K)[None, :]
    return rows, columns, inside


@triton.jit
def _produced(
    x,
    mean,
    rstd,
    norm_weight,
    norm_bias,
    stride,
    rows,
    columns,
    inside,
    K: tl.constexpr,
    PRODUCER: tl.constexpr,
):
    """A tile (ROWS, COLUMNS) of the numbers to round, in float32; zero outside."""
    place = x + rows[:, None] * stride + columns[None, :]
    value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if PRODUCER == "geglu":
        gate = tl.load(place + K, mask=inside, other=0.0).to(tl.float32)
        # As in `geglu.triton`.
        value = value * (gate * _normal_cdf(gate))
    if PRODUCER == "layer_norm":
        # As in `layer_norm.triton`, from the statistics that it left.
        known = tl.sum(inside.to(tl.int32), axis=1) > 0
        row_mean = tl.load(mean + rows, mask=known, other=0.0)  # narrow: one a row
        row_rstd = tl.load(rstd + rows, mask=known, other=0.0)  # narrow: one a row
        is_column = columns < K
        scale = tl.load(norm_weight + columns, mask=is_column, other=0.0)  # narrow: 64 a program
        offset = tl.load(norm_bias + columns, mask=is_column, other=0.0)  # narrow: 64 a program
        value = (value - row_mean[:, None]) * row_rstd[:, None]
        value = value * scale.to(tl.float32)[None, :] + offset.to(tl.float32)[None, :]
        # Outside is now -mean * rstd * scale + offset.
        value = tl.where(inside, value, 0.0)
    return value


@triton.jit
def _bits_of_largest(magnitudes):
    """The largest of float32 magnitudes, as the bits of an integer.

    The bits of IEEE floats without sign have the order of the numbers, NaN above all, so that an
    integer atomic will do; a maximum does not depend on the order of the programs.
    """
    return tl.max(magnitudes.to(tl.int32, bitcast=True))


@triton.jit
def _saturated(value, LARGEST: tl.constexpr):
    """Numbers within the range of an FP8 format; NaN stays."""
    return tl.clamp(value, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _store_transposed(transposed, value, rows, columns, P, K: tl.constexpr):
    """A tile (ROWS, COLUMNS) into (K, P); rows from M to P are written too: the matmul sums them"""
    place = transposed + columns[:, None].to(tl.int64) * P + rows[None, :]
    tl.store(place, tl.trans(value), mask=(columns < K)[:, None] & (rows < P)[None, :])


@triton.jit
def amax_kernel(
    x,
    mean,
    rstd,
    norm_weight,
    norm_bias,
    amax,
    M,
    stride,
    K: tl.constexpr,
    PRODUCER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows, columns, inside = _tile(M, K, ROWS, COLUMNS)
    value = _produced(
        x, mean, rstd, norm_weight, norm_bias, stride, rows, columns, inside, K, PRODUCER
    )
    tl.atomic_max(amax, _bits_of_largest(tl.abs(value)))


# Slots of delayed scales lie at any multiple of 4 bytes: one compilation serves them all.
@triton.jit(do_not_specialize_on_alignment=["amax", "inverse"])
def quantise_kernel(
    x,
    mean,
    rstd,
    norm_weight,
    norm_bias,
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
    PRODUCER: tl.constexpr,
    DELAYED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows, columns, inside = _tile(M, K, ROWS, COLUMNS)
    value = _produced(
        x, mean, rstd, norm_weight, norm_bias, stride, rows, columns, inside, K, PRODUCER
    )
    if sums is not None:
        place = sums + tl.program_id(0).to(tl.int64) * K + columns
        tl.store(place, tl.sum(value, 0), mask=columns < K)  # narrow: one row a program
    if DELAYED:
        tl.atomic_max(amax, _bits_of_largest(tl.abs(value)))
        value = value * tl.div_rn(1.0, tl.load(inverse))  # narrow: one number
    else:
        magnitude = tl.load(amax).to(tl.float32, bitcast=True)  # narrow: one number
        # The largest magnitude becomes the largest number of the format (Micikevicius et al., "FP8
        # Formats for Deep Learning", 2022). Zeros need no scale; NaN is not equal to zero, and
        # stays.
        unscale = tl.where(magnitude == 0.0, 1.0, tl.div_rn(magnitude, LARGEST))
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(inverse, unscale)  # narrow: one number
        value = tl.div_rn(value, unscale)
    # Rounding of the division may pass the largest number by an ulp, and FP8 has no room above it;
    # and delayed scales are those of smaller numbers.
    value = _saturated(value, LARGEST).to(numbers.dtype.element_ty)
    tl.store(numbers + rows[:, None] * K + columns[None, :], value, mask=inside)
    _store_transposed(transposed, value, rows, columns, P, K)


def outputs_of(
    x: torch.Tensor, M: int, K: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unwritten FP8 numbers (M, K) and their transpose (K, P)."""
    return empty(x, (M, K), dtype), empty(x, (K, triton.cdiv(M, 16) * 16), dtype)


def fake_outputs(
    x: torch.Tensor, M: int, K: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same where there is nothing to launch."""
    shapes = (M, K), (K, (M + 15) // 16 * 16)
    numbers, transposed = (x.new_empty(shape, dtype=dtype) for shape in shapes)
    return numbers, transposed


def _columns(x: torch.Tensor, producer: str) -> int:
    return x.shape[1] // (2 if producer == "geglu" else 1)


def _tiling(x: torch.Tensor, K: int, producer: str) -> tuple[tuple[int, int], dict[str, Any]]:
    """Grid and options. Rows of the grid cover P, not M: the padding is written too."""
    P = triton.cdiv(x.shape[0], 16) * 16
    options = {"K": K, "PRODUCER": producer, "num_warps": TUNING.warps}
    options |= {"ROWS": TUNING.rows, "COLUMNS": TUNING.columns}
    return (triton.cdiv(P, TUNING.rows), triton.cdiv(K, TUNING.columns)), options


@torch.library.custom_op("sd_kernels::fp8_quantise", mutates_args=())
def fp8_quantise(
    x: torch.Tensor,
    dtype: torch.dtype,
    producer: str = "none",
    mean: torch.Tensor | None = None,
    rstd: torch.Tensor | None = None,
    amax: torch.Tensor | None = None,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FP8 numbers (M, K), their transpose (K, P), and the factor () that undoes the scale, float32.

    Scaling is current. x is (M, K) or, for the producer GEGLU, (M, 2K). `amax` () int32 has the
    bits of the largest magnitude where it is known; then there is only the second sweep. For the
    producer LayerNorm `mean` and `rstd` (M,) float32, `norm_weight` and `norm_bias` (K,) are given.
    """
    M, K = x.shape[0], _columns(x, producer)
    numbers, transposed = outputs_of(x, M, K, dtype)
    inverse = empty(x, (), torch.float32)
    inputs = x, mean, rstd, norm_weight, norm_bias
    grid, options = _tiling(x, K, producer)
    if amax is None:
        amax = torch.zeros((), dtype=torch.int32, device=x.device)
        launch(amax_kernel, grid, *inputs, amax, M, x.stride(0), **options)
    outputs = inverse, numbers, transposed, None
    sizes = M, transposed.shape[1], x.stride(0)
    options |= {"LARGEST": FORMATS[dtype], "DELAYED": False}
    launch(quantise_kernel, grid, *inputs, amax, *outputs, *sizes, **options)
    return rounded(numbers, dtype), rounded(transposed, dtype), inverse


@fp8_quantise.register_fake
def _(x, dtype, producer="none", mean=None, rstd=None, amax=None, norm_weight=None, norm_bias=None):
    outputs = fake_outputs(x, x.shape[0], _columns(x, producer), dtype)
    return *outputs, x.new_empty((), dtype=torch.float32)


@torch.library.custom_op("sd_kernels::fp8_quantise_delayed", mutates_args=("amax",))
def fp8_quantise_delayed(
    x: torch.Tensor,
    dtype: torch.dtype,
    inverse: torch.Tensor,
    amax: torch.Tensor,
    producer: str = "none",
    with_sums: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """FP8 numbers (M, K), their transpose (K, P) and sums over rows, by a scale that is known.

    x is as for `fp8_quantise`; the producer is GEGLU or none. `inverse` and `amax` are () float32:
    the scale's inverse, and what becomes the largest magnitude if it is smaller. The sums (S, K)
    float32, each over some of the rows of x, are empty unless asked for.
    """
    M, K = x.shape[0], _columns(x, producer)
    numbers, transposed = outputs_of(x, M, K, dtype)
    grid, options = _tiling(x, K, producer)
    sums = empty(x, (grid[0] if with_sums else 0, K), torch.float32)
    outputs = numbers, transposed, sums if with_sums else None
    arguments = x, None, None, None, None, amax.view(torch.int32), inverse, *outputs
    options |= {"LARGEST": FORMATS[dtype], "DELAYED": True}
    launch(quantise_kernel, grid, *arguments, M, transposed.shape[1], x.stride(0), **options)
    return rounded(numbers, dtype), rounded(transposed, dtype), sums


@fp8_quantise_delayed.register_fake
def _(x, dtype, inverse, amax, producer="none", with_sums=False):
    M, K = x.shape[0], _columns(x, producer)
    blocks = (M + 15) // 16 * 16
    sums = (-(-blocks // TUNING.rows) if with_sums else 0, K)
    return *fake_outputs(x, M, K, dtype), x.new_empty(sums, dtype=torch.float32)
