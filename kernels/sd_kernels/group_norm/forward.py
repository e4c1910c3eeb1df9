"""Group normalisation forward: one launch that reads each source once from device memory.

The statistics of a tile are, for each group that it touches, the tile's own mean and its sum of
squared deviations from that mean. Results combine them; see `_combined`. Per element the launch
moves one read and one write; a residual is one more read, the returned sum one more write, which
is also the concatenation with a skip.

Shape letters and sizes: see `tiles`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sd_kernels.group_norm.tiles import (
    TUNING,
    arrive,
    groups_of,
    load_by_channel,
    load_parts,
    load_sources,
    plan,
    sigmoid,
    slots_of_groups,
    slots_of_tile,
    source_strides,
    store_pixels,
    sum_of,
    take_item,
    to_channels,
    to_groups,
    wait,
)
from sd_kernels.launch import counters, empty, launch, rounded


@triton.jit
def _tile_statistics(value, inside, member, pixels):
    """Mean and sum of squared deviations (TOUCHED,) of a tile's part of each group."""
    width = tl.sum(tl.where(member, 1.0, 0.0), axis=0)
    elements = tl.maximum(width * pixels, 1.0)
    own_mean = to_groups(tl.sum(value, axis=0), member) / elements
    # Two passes over registers: E[x^2] - E[x]^2 would cancel where the mean is far from zero. The
    # mean of the deviations is what the first mean lost to rounding.
    difference = tl.where(inside, value - to_channels(own_mean, member), 0.0)
    own_mean += to_groups(tl.sum(difference, axis=0), member) / elements
    return own_mean, to_groups(tl.sum(difference * difference, axis=0), member)


@triton.jit
def _combined(
    means,
    deviations,
    place,
    count,
    exists,
    eps,
    N: tl.constexpr,
    CPG: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """Mean and 1 / sqrt(variance + eps) of whole groups (TOUCHED,), from those of their tiles.

    Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance" (1983): the squared
    deviations of a union are those of its parts, plus count * (mean of the part - mean of the
    union)^2 for each part. The order of all sums is fixed, so that results are repeatable.
    """
    tile_mean = load_parts(means + place, exists)
    tile_deviation = load_parts(deviations + place, exists)
    count = tl.where(exists, count, 0.0)
    # Means are averaged as distances from the first, which loses no digits where they are far from
    # zero.
    origin = tl.sum(tl.where(tl.arange(0, SLOTS)[None, :] == 0, tile_mean, 0.0), axis=1)
    group_mean = origin + tl.sum(count * (tile_mean - origin[:, None]), axis=1) / (N * CPG)
    offset = tl.where(exists, tile_mean - group_mean[:, None], 0.0)
    deviation = tl.sum(tile_deviation + count * offset * offset, axis=1)
    return group_mean, tl.rsqrt(deviation / (N * CPG) + eps)


# Each batch size would otherwise be compiled anew where it is 1, or first a multiple of 16.
@triton.jit(do_not_specialize=["B"])
def group_norm_forward_kernel(
    x, skip, shift, residual, weight, bias, y, summed, mean, rstd, counters, means, deviations,
    B, eps, x_stride, x_pixel, skip_stride, skip_pixel, shift_stride, residual_stride,
    residual_pixel, N: tl.constexpr, C1: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
    SILU: tl.constexpr, ITEMS: tl.constexpr, LAG: tl.constexpr, PIXEL_TILES: tl.constexpr,
    SPAN: tl.constexpr, SLOTS: tl.constexpr, TOUCHED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    CPG: tl.constexpr = C // G
    sample, item, exists, launches = take_item(counters, B, ITEMS, 0, LAG)
    if not exists:
        return
    is_result, item = item >= ITEMS, item % ITEMS
    tile, block = item % PIXEL_TILES, item // PIXEL_TILES
    rows = tile * ROWS + tl.arange(0, ROWS)
    channels = block * BLOCK + tl.arange(0, BLOCK)
    # Tiles at the last pixels and channels reach past the image.
    inside = (rows < N)[:, None] & (channels < C)[None, :]
    first, member = groups_of(block, CPG, C, TOUCHED, BLOCK)
    groups = first + tl.arange(0, TOUCHED)
    at = (sample, rows, channels)
    layout = (
        x_stride,
        x_pixel,
        skip_stride,
        skip_pixel,
        shift_stride,
        residual_stride,
        residual_pixel,
    )
    if summed is None:
        # Read before a result waits, so that the wait hides the read.
        raw = load_sources(x, skip, layout, at, inside, C1, "")
    if is_result:
        wait(counters, sample, launches, ITEMS)
        place, count, known = slots_of_groups(
            sample, first, N, G, CPG, PIXEL_TILES, SPAN, SLOTS, TOUCHED, ROWS, BLOCK
        )
        group_mean, group_rstd = _combined(
            means, deviations, place, count, known, eps, N, CPG, SLOTS
        )
        if tile == 0:
            # Backward reads these. The block with the first channel of a group stores them, once.
            is_first = (groups < G) & (groups * CPG // BLOCK == block)
            tl.store(mean + sample * G + groups, group_mean, mask=is_first)  # narrow: few numbers
            tl.store(rstd + sample * G + groups, group_rstd, mask=is_first)  # narrow: few numbers
        if summed is not None:
            # The first sweep has added everything up; its tile was written by another program.
            raw = load_sources(summed, None, (N * C, C, 0, 0), at, inside, C, ".cg")
            value = raw.to(tl.float32)
        else:
            value = sum_of(raw, shift, residual, layout, at, inside, C1)
        scale = load_by_channel(weight, channels, C)[None, :]
        offset = load_by_channel(bias, channels, C)[None, :]
        # Wu and He, "Group Normalization" (2018), section 3.1, and SiLU.
        value = (value - to_channels(group_mean, member)) * to_channels(group_rstd, member)
        value = value * scale + offset
        if SILU:
            value = value * sigmoid(value)
        store_pixels(y, value, at, C, N, inside)
    else:
        if summed is not None:
            raw = load_sources(x, skip, layout, at, inside, C1, "")
        value = sum_of(raw, shift, residual, layout, at, inside, C1)
        if summed is not None:
            # Normalise the rounded sum: it is what backward and all later uses read.
            rounded_sum = value.to(summed.dtype.element_ty)
            store_pixels(summed, rounded_sum, at, C, N, inside)
            value = rounded_sum.to(tl.float32)
        pixels = tl.minimum(N - tile * ROWS, ROWS)
        own_mean, own_deviation = _tile_statistics(value, inside, member, pixels)
        slot, is_slot = slots_of_tile(
            sample, tile, block, first, G, CPG, PIXEL_TILES, SPAN, TOUCHED, BLOCK
        )
        tl.store(means + slot, own_mean, mask=is_slot)  # narrow: few numbers
        tl.store(deviations + slot, own_deviation, mask=is_slot)  # narrow: few numbers
        arrive(counters, sample)


@torch.library.custom_op("sd_kernels::group_norm_forward", mutates_args=())
def group_norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
    skip: torch.Tensor | None,
    num_groups: int,
    eps: float,
    silu: bool,
    return_sum: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """y and what is normalised (B, C, H, W), and the float32 mean and 1 / deviation (B, G).

    The second is empty without `return_sum`. Images are dense in channels-last memory.
    """
    B, C1, H, W = x.shape
    C = weight.shape[0]
    launch_plan = plan(B, H * W, C, num_groups, TUNING.forward_rows)
    y = empty(x, (B, H, W, C)).permute(0, 3, 1, 2)
    summed = empty(x, (B, H, W, C)).permute(0, 3, 1, 2) if return_sum else None
    mean, rstd = (empty(x, (B, num_groups), torch.float32) for _ in range(2))
    # The ticket counter, then the finished tiles of each sample.
    alike = group_norm_forward_kernel, B, *launch_plan.sizes.values()
    tickets = counters(x, 1 + B, *alike)
    parts = B, num_groups, launch_plan.sizes["PIXEL_TILES"], launch_plan.sizes["SPAN"]
    means, deviations = (empty(x, parts, torch.float32) for _ in range(2))
    sources = x, skip, shift, residual
    outputs, scratch = (y, summed, mean, rstd), (tickets, means, deviations)
    launch(
        group_norm_forward_kernel,
        (launch_plan.programs,),
        *(*sources, weight, bias, *outputs, *scratch, B, eps, *source_strides(*sources)),
        C1=C1,
        SILU=silu,
        **launch_plan.sizes,
        num_warps=launch_plan.num_warps,
    )
    returned = x.new_empty(0) if summed is None else rounded(summed, x.dtype)
    return rounded(y, x.dtype), returned, mean, rstd


@group_norm_forward.register_fake
def _(x, weight, bias, shift, residual, skip, num_groups, eps, silu, return_sum):
    B, _, H, W = x.shape
    image = B, H, W, weight.shape[0]
    y = x.new_empty(image).permute(0, 3, 1, 2)
    summed = x.new_empty(image).permute(0, 3, 1, 2) if return_sum else x.new_empty(0)
    mean, rstd = (x.new_empty(B, num_groups, dtype=torch.float32) for _ in range(2))
    return y, summed, mean, rstd
