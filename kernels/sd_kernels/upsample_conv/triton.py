"""The merged form of `merged`, with Triton kernels around torch's 2x2 convolution.

One kernel merges the weights before the convolution, one interleaves its result after; each has a
kernel for its gradient. Merging reads nine taps and writes sixteen, with sums in float32; its
gradient reads sixteen and writes nine. Interleaving writes the pixels of each parity to their
places; its gradient reads dy and writes the gradient of the convolution's result, with zeros where
a parity has no pixel. A convolution that interleaves by itself would save one read and one write of
y and of dy; nothing else is moved twice.

Shape letters: B samples, C channels, K output channels, H and W rows and columns of the small
image. A parity (a, c) is the row and column of an upsampled pixel modulo 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from sd_kernels.launch import empty, launch, rounded
from sd_kernels.upsample_conv.merged import check


@dataclass(frozen=True)
class Tuning:
    """Launch constants."""

    rows: int = 32
    """pixels of a tile: with 128 channels 32 elements for each thread of 4 warps, four 16-byte
    loads"""
    outputs: int = 8
    """output channels of a tile: few, since each element needs nine or sixteen registers"""
    columns: int = 128
    """channels of a tile: divides 640 and 1280, the widths of the UNet's three calls"""


TUNING = Tuning()
_ROWS, _OUTPUTS = {"ROWS": TUNING.rows}, {"OUTPUTS": TUNING.outputs}


@triton.jit
def _tile(num_rows, N: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows (ROWS,) and columns (1, COLUMNS) of a program, and which elements are inside."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows < num_rows)[:, None]
    # Only ragged widths pay for a mask of columns, which would split the 16-byte accesses.
    if N % COLUMNS != 0:
        inside = inside & (columns < N)[None, :]
    return rows, columns[None, :], inside


@triton.jit
def _three_taps(place, C: tl.constexpr, inside):
    """One row of 3x3 kernels, in float32."""
    # Weights are channels-last: taps are C elements apart.
    first = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(place + C, mask=inside, other=0.0).to(tl.float32)
    third = tl.load(place + 2 * C, mask=inside, other=0.0).to(tl.float32)
    return first, second, third


@triton.jit
def _store_merged(
    merged, a: tl.constexpr, r: tl.constexpr, first, second, third, K, C: tl.constexpr, inside
):
    """Row r of the 2x2 kernels of parities (a, 0) and (a, 1), from three taps of a row.

    `merged` is (2, 2, K, 2, 2, C): both parities, output channel, row, column, channel.
    """
    even = merged + 2 * a * K * 4 * C + 2 * r * C
    odd = even + K * 4 * C
    # An even column sees taps 0 | 1 + 2, an odd one 0 + 1 | 2; see `merged`.
    tl.store(even, first, mask=inside)
    tl.store(even + C, second + third, mask=inside)
    tl.store(odd, first + second, mask=inside)
    tl.store(odd + C, third, mask=inside)


@triton.jit
def merge_forward_kernel(
    weight, merged, K, C: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr
):
    outputs, columns, inside = _tile(K, C, OUTPUTS, COLUMNS)
    source = weight + outputs[:, None] * 9 * C + columns
    place = merged + outputs[:, None] * 4 * C + columns
    top0, top1, top2 = _three_taps(source, C, inside)
    middle0, middle1, middle2 = _three_taps(source + 3 * C, C, inside)
    bottom0, bottom1, bottom2 = _three_taps(source + 6 * C, C, inside)
    # The same along rows: parity 0 has rows top | middle + bottom, parity 1 top + middle | bottom.
    _store_merged(place, 0, 0, top0, top1, top2, K, C, inside)
    _store_merged(
        place, 0, 1, middle0 + bottom0, middle1 + bottom1, middle2 + bottom2, K, C, inside
    )
    _store_merged(place, 1, 0, top0 + middle0, top1 + middle1, top2 + middle2, K, C, inside)
    _store_merged(place, 1, 1, bottom0, bottom1, bottom2, K, C, inside)


@triton.jit
def _load_merged(dmerged, a: tl.constexpr, r: tl.constexpr, K, C: tl.constexpr, inside):
    """Gradients of the three taps that `_store_merged` was given."""
    # Each tap gets the gradients of the sums it is in: even 0 | 1 + 2, odd 0 + 1 | 2.
    even = dmerged + 2 * a * K * 4 * C + 2 * r * C
    odd = even + K * 4 * C
    even0 = tl.load(even, mask=inside, other=0.0).to(tl.float32)
    even1 = tl.load(even + C, mask=inside, other=0.0).to(tl.float32)
    odd0 = tl.load(odd, mask=inside, other=0.0).to(tl.float32)
    odd1 = tl.load(odd + C, mask=inside, other=0.0).to(tl.float32)
    return even0 + odd0, even1 + odd0, even1 + odd1


@triton.jit
def _store_taps(place, first, second, third, C: tl.constexpr, inside):
    """One row of 3x3 kernels."""
    tl.store(place, first, mask=inside)
    tl.store(place + C, second, mask=inside)
    tl.store(place + 2 * C, third, mask=inside)


@triton.jit
def merge_backward_kernel(
    dmerged, dweight, K, C: tl.constexpr, OUTPUTS: tl.constexpr, COLUMNS: tl.constexpr
):
    outputs, columns, inside = _tile(K, C, OUTPUTS, COLUMNS)
    source = dmerged + outputs[:, None] * 4 * C + columns
    place = dweight + outputs[:, None] * 9 * C + columns
    # Parity 0 has rows top | middle + bottom, parity 1 top + middle | bottom: top takes the first
    # row of both, middle the second of 0 and the first of 1, bottom the second of both. Each step
    # loads one of the four rows anew and keeps another.
    even0, even1, even2 = _load_merged(source, 0, 0, K, C, inside)
    odd0, odd1, odd2 = _load_merged(source, 1, 0, K, C, inside)
    _store_taps(place, even0 + odd0, even1 + odd1, even2 + odd2, C, inside)
    even0, even1, even2 = _load_merged(source, 0, 1, K, C, inside)
    _store_taps(place + 3 * C, even0 + odd0, even1 + odd1, even2 + odd2, C, inside)
    odd0, odd1, odd2 = _load_merged(source, 1, 1, K, C, inside)
    _store_taps(place + 6 * C, even0 + odd0, even1 + odd1, even2 + odd2, C, inside)


@triton.jit
def interleave_forward_kernel(
    z,
    y,
    pixels,
    H: tl.constexpr,
    W: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows, columns, inside = _tile(pixels, K, ROWS, COLUMNS)
    row, column, sample = rows // (2 * W) % (2 * H), rows % (2 * W), rows // (4 * H * W)
    # Parity a finds row i of the small image at position i + a of the padded convolution's result.
    a, c = row % 2, column % 2
    position = (sample * (H + 1) + row // 2 + a) * (W + 1) + column // 2 + c
    # Parities are blocks of K channels of z. An image may have more than 2^31 elements.
    source = (position * 4 + 2 * a + c).to(tl.int64)
    value = tl.load(z + source[:, None] * K + columns, mask=inside, other=0.0)
    tl.store(y + rows.to(tl.int64)[:, None] * K + columns, value, mask=inside)


@triton.jit
def interleave_backward_kernel(
    dy,
    dz,
    slots,
    H: tl.constexpr,
    W: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    rows, columns, inside = _tile(slots, K, ROWS, COLUMNS)
    position = rows // 4
    a, c = rows // 2 % 2, rows % 2
    i = position // (W + 1) % (H + 1) - a
    j = position % (W + 1) - c
    # The convolution's result has one more row and column than the image: each parity leaves out
    # one of either, whose gradient is zero.
    has_pixel = (i >= 0) & (i < H) & (j >= 0) & (j < W)
    sample = position // ((H + 1) * (W + 1))
    source = ((sample * 2 * H + 2 * i + a) * 2 * W + 2 * j + c).to(tl.int64)
    value = tl.load(dy + source[:, None] * K + columns, mask=inside & has_pixel[:, None], other=0.0)
    tl.store(dz + rows.to(tl.int64)[:, None] * K + columns, value, mask=inside)


def _launch(
    kernel: Any,
    source: torch.Tensor,
    shape: tuple[int, ...],
    tile: dict[str, int],
    rows: int,
    columns: int,
    **sizes: int,
) -> torch.Tensor:
    """Run a kernel over `rows` rows of `columns` channels; returns (B, C, H, W), channels-last.

    `tile` is the kernel's argument for the rows of a tile; `sizes` are its other constants.
    """
    B, channels, H, W = shape
    output = empty(source, (B, H, W, channels))
    [tile_rows] = tile.values()
    grid = triton.cdiv(rows, tile_rows), triton.cdiv(columns, TUNING.columns)
    source = source.contiguous(memory_format=torch.channels_last)
    launch(kernel, grid, source, output, rows, **sizes, **tile, COLUMNS=TUNING.columns)
    return rounded(output, source.dtype).permute(0, 3, 1, 2)


def _fake(like: torch.Tensor, B: int, channels: int, H: int, W: int) -> torch.Tensor:
    return like.new_empty(B, H, W, channels).permute(0, 3, 1, 2)


@torch.library.custom_op("sd_kernels::upsample_conv_merge_forward", mutates_args=())
def merge_forward(weight: torch.Tensor) -> torch.Tensor:
    """Weights (K, C, 3, 3) merged to (4 * K, C, 2, 2): see `merged.merge`."""
    K, C = weight.shape[:2]
    shape = 4 * K, C, 2, 2
    return _launch(merge_forward_kernel, weight, shape, _OUTPUTS, rows=K, columns=C, C=C)


@torch.library.custom_op("sd_kernels::upsample_conv_merge_backward", mutates_args=())
def merge_backward(dmerged: torch.Tensor) -> torch.Tensor:
    """The gradient of the weights (K, C, 3, 3)."""
    K, C = dmerged.shape[0] // 4, dmerged.shape[1]
    shape = K, C, 3, 3
    return _launch(merge_backward_kernel, dmerged, shape, _OUTPUTS, rows=K, columns=C, C=C)


@torch.library.custom_op("sd_kernels::upsample_conv_interleave_forward", mutates_args=())
def interleave_forward(z: torch.Tensor) -> torch.Tensor:
    """z (B, 4 * K, H + 1, W + 1) to (B, K, 2H, 2W): see `merged.interleave`."""
    B, K, H, W = z.shape[0], z.shape[1] // 4, z.shape[2] - 1, z.shape[3] - 1
    sizes = {"rows": 4 * B * H * W, "columns": K, "H": H, "W": W, "K": K}
    return _launch(interleave_forward_kernel, z, (B, K, 2 * H, 2 * W), _ROWS, **sizes)


@torch.library.custom_op("sd_kernels::upsample_conv_interleave_backward", mutates_args=())
def interleave_backward(dy: torch.Tensor) -> torch.Tensor:
    """The gradient of z (B, 4 * K, H + 1, W + 1), from dy (B, K, 2H, 2W)."""
    B, K, H, W = dy.shape[0], dy.shape[1], dy.shape[2] // 2, dy.shape[3] // 2
    sizes = {"rows": 4 * B * (H + 1) * (W + 1), "columns": K, "H": H, "W": W, "K": K}
    return _launch(interleave_backward_kernel, dy, (B, 4 * K, H + 1, W + 1), _ROWS, **sizes)


@merge_forward.register_fake
def _(weight: torch.Tensor) -> torch.Tensor:
    return _fake(weight, 4 * weight.shape[0], weight.shape[1], 2, 2)


@merge_backward.register_fake
def _(dmerged: torch.Tensor) -> torch.Tensor:
    return _fake(dmerged, dmerged.shape[0] // 4, dmerged.shape[1], 3, 3)


@interleave_forward.register_fake
def _(z: torch.Tensor) -> torch.Tensor:
    return _fake(z, z.shape[0], z.shape[1] // 4, 2 * (z.shape[2] - 1), 2 * (z.shape[3] - 1))


@interleave_backward.register_fake
def _(dy: torch.Tensor) -> torch.Tensor:
    return _fake(dy, dy.shape[0], 4 * dy.shape[1], dy.shape[2] // 2 + 1, dy.shape[3] // 2 + 1)


merge_forward.register_autograd(lambda ctx, dmerged: merge_backward(dmerged))
interleave_forward.register_autograd(lambda ctx, dy: interleave_backward(dy))


def upsample_conv(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """See `reference.upsample_conv`; x, weight and result are dense in channels-last memory."""
    check(x, weight)
    return interleave_forward(F.conv2d(x, merge_forward(weight).to(x.dtype), padding=1))
