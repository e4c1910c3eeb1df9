"""Rounding to FP8 with current scaling, fused with what makes the numbers, both ways round in one
pass.

Current scaling needs the largest magnitude before the first number can be rounded, so that there
are two sweeps: one reads what the numbers are made of and keeps their largest magnitude, the other
reads it again and writes the numbers in FP8. GEGLU and LayerNorm are computed in both and their
result never exists in 16 bits: GEGLU, of 2 x 16 bits a number, moves 10 bytes a number where
writing 16 bits first would move as many and keep two more until the backward pass; LayerNorm moves
6 instead of 8.

Matrix units of Hopper take FP8 operands with the summed axis contiguous. A gradient of the weights
sums over rows, so the second sweep writes each tile as it is and transposed; a further pass for the
transposed copy is not needed.

Shape letters: M rows, K columns, P rows padded to a multiple of 16 (with zeros, which add nothing
to a sum).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sd_kernels.fp8_linear.reference import FORMATS
from sd_kernels.geglu.triton import _normal_cdf
from sd_kernels.launch import empty, launch, rounded

ROWS, COLUMNS = 128, 64
"""tile of a program: 128 bytes of a transposed row; every width of the UNet is a multiple of 64"""


@triton.jit
def _tile(M, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < M)[:, None]
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
    """A tile of the numbers to round, in float32; zero outside."""
    place = x + rows[:, None] * stride + columns[None, :]
    value = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if PRODUCER == "geglu":
        gate = tl.load(place + K, mask=inside, other=0.0).to(tl.float32)
        value = value * (gate * _normal_cdf(gate))
    if PRODUCER == "layer_norm":
        known = tl.sum(inside.to(tl.int32), axis=1) > 0
        row_mean = tl.load(mean + rows, mask=known, other=0.0)  # narrow: one a row
        row_rstd = tl.load(rstd + rows, mask=known, other=0.0)  # narrow: one a row
        scale = tl.load(norm_weight + columns, mask=columns < K, other=0.0).to(
            tl.float32
        )  # narrow: 64 a program
        offset = tl.load(norm_bias + columns, mask=columns < K, other=0.0).to(
            tl.float32
        )  # narrow: 64 a program
        value = (value - row_mean[:, None]) * row_rstd[:, None] * scale[None, :] + offset[None, :]
        value = tl.where(inside, value, 0.0)
    return value


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
    # Bits of numbers without sign are in the order of the numbers, NaN above all, and a maximum has
    # no order.
    largest = tl.max(tl.abs(value).to(tl.int32, bitcast=True))
    tl.atomic_max(amax, largest)


@triton.jit
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
    M,
    P,
    stride,
    K: tl.constexpr,
    LARGEST: tl.constexpr,
    PRODUCER: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows, columns, inside = _tile(M, K, ROWS, COLUMNS)
    value = _produced(
        x, mean, rstd, norm_weight, norm_bias, stride, rows, columns, inside, K, PRODUCER
    )
    magnitude = tl.load(amax).to(tl.float32, bitcast=True)  # narrow: one number
    # NaN is not equal to zero, and stays.
    undo = tl.where(magnitude == 0.0, 1.0, tl.div_rn(magnitude, LARGEST))
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(inverse, undo)  # narrow: one number
    value = tl.div_rn(value, undo)
    value = tl.clamp(value, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL).to(
        numbers.dtype.element_ty
    )
    tl.store(numbers + rows[:, None] * K + columns[None, :], value, mask=inside)
    place = transposed + columns[:, None].to(tl.int64) * P + rows[None, :]
    tl.store(place, tl.trans(value), mask=(columns < K)[:, None] & (rows < P)[None, :])


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
    """produced(x) (M, K) in FP8, the same transposed (K, P), and what undoes the scale (); x (M,
    K), GEGLU: (M, 2K).

    `amax` () int32 has the bits of the largest magnitude, where it is known; then there is one
    sweep.
    """
    M, K = x.shape[0], x.shape[1] // (2 if producer == "geglu" else 1)
    P = triton.cdiv(M, 16) * 16
    numbers, transposed, inverse = (
        empty(x, (M, K), dtype),
        empty(x, (K, P), dtype),
        empty(x, (), torch.float32),
    )
    made_of = x, mean, rstd, norm_weight, norm_bias
    # The last program's rows reach past P.
    grid = triton.cdiv(P, ROWS), triton.cdiv(K, COLUMNS)
    sizes = {"K": K, "PRODUCER": producer, "ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": 8}
    if amax is None:
        amax = torch.zeros((), dtype=torch.int32, device=x.device)
        launch(amax_kernel, grid, *made_of, amax, M, x.stride(0), **sizes)
    outputs = inverse, numbers, transposed
    launch(
        quantise_kernel,
        grid,
        *made_of,
        amax,
        *outputs,
        M,
        P,
        x.stride(0),
        LARGEST=FORMATS[dtype],
        **sizes,
    )
    return rounded(numbers, dtype), rounded(transposed, dtype), inverse


@fp8_quantise.register_fake
def _(x, dtype, producer="none", mean=None, rstd=None, amax=None, norm_weight=None, norm_bias=None):
    M, K = x.shape[0], x.shape[1] // (2 if producer == "geglu" else 1)
    numbers, transposed = (
        x.new_empty(shape, dtype=dtype) for shape in ((M, K), (K, (M + 15) // 16 * 16))
    )
    return numbers, transposed, x.new_empty((), dtype=torch.float32)
