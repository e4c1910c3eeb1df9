"""Group normalisation backward: one launch that reads x and dy once from device memory.

With v the normalised value, w the weight and dz the gradient of what went into SiLU (the derivation
is that of Ioffe and Szegedy, "Batch Normalization", 2015, section 3, with a group for the batch):

    dx = rstd * (w dz - mean(w dz) - v mean(w dz v))    means over a group
    dweight = sum(dz v), dbias = sum(dz)                sums over samples and pixels

The first sweep sums w dz and w dz v of each tile by group, and dz and dz v by channel. The second
combines them. Further programs add up the sums by channel, one for each sample and block of
channels, and the last one of a block adds those of all samples. All sums have a fixed order, so
that gradients are repeatable. Per element the launch moves two reads (x, dy) and one
write; the gradient of each later use of the sum is one more read.

Shape letters and sizes: see `tiles`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sd_kernels.group_norm.rows import dense
from sd_kernels.group_norm.tiles import (
    TUNING,
    arrive,
    groups_of,
    load_by_channel,
    load_parts,
    load_pixels,
    load_raw,
    load_sources,
    plan,
    sigmoid,
    slots_of_groups,
    slots_of_tile,
    source_strides,
    store_pixels,
    strides,
    sum_of,
    take_item,
    to_channels,
    to_groups,
    wait,
)
from sd_kernels.launch import counters, empty, launch, rounded


@triton.jit
def _before_silu(value, grad, SILU: tl.constexpr):
    """Gradient with respect to what went into SiLU, `value` (ROWS, BLOCK)."""
    if SILU:
        # d/dz (z s(z)) = s(z) (1 + z (1 - s(z))) with s the logistic function
        gate = sigmoid(value)
        grad = grad * gate * (1.0 + value * (1.0 - gate))
    return grad


@triton.jit
def _later_uses(dsummed, dagain, layout, at, inside):
    """The gradient (ROWS, BLOCK) that the sum gets from where it is read later, in float32."""
    stride, pixel, again_stride, again_pixel = layout
    grad = load_pixels(dsummed, stride, pixel, at, inside)
    if dagain is not None:
        grad += load_pixels(dagain, again_stride, again_pixel, at, inside)
    return grad


@triton.jit
def _store_group_sums(
    group_sums, half, tile, sums, member, G: tl.constexpr, CPG: tl.constexpr,
    PIXEL_TILES: tl.constexpr, SPAN: tl.constexpr, TOUCHED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile's sums of w dz and of w dz v by group, from those by channel (BLOCK,)."""
    sample, number, block, first = tile
    slot, is_slot = slots_of_tile(
        sample, number, block, first, G, CPG, PIXEL_TILES, SPAN, TOUCHED, BLOCK
    )
    tl.store(group_sums + slot, to_groups(sums[0], member), mask=is_slot)  # narrow: few numbers
    tl.store(group_sums + half + slot, to_groups(sums[1], member), mask=is_slot)  # narrow: few


@triton.jit
def _add_up(
    group_sums, channel_sums, weight, rstd, dshift, sample_sums, vectors, counters, sample, block,
    B, dshift_stride, N: tl.constexpr, C1: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
    SUMS: tl.constexpr, OUT: tl.constexpr, PIXEL_TILES: tl.constexpr, SPAN: tl.constexpr,
    SLOTS: tl.constexpr, PARTS: tl.constexpr, TOUCHED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    """Sums of one sample and block over its tiles; the last sample's program adds all samples."""
    CPG: tl.constexpr = C // G
    channels = block * BLOCK + tl.arange(0, BLOCK)
    tiles, is_channel = tl.arange(0, PARTS)[:, None], channels < C
    exists = (tiles < PIXEL_TILES) & is_channel[None, :]
    of_tiles = (sample.to(tl.int64) * PIXEL_TILES + tiles) * (SUMS * C) + channels[None, :]
    of_tiles = channel_sums + of_tiles
    grad_sum = tl.sum(load_parts(of_tiles, exists), axis=0)
    product_sum = tl.sum(load_parts(of_tiles + C, exists), axis=0)
    sums = sample_sums + sample * (OUT * C) + channels
    tl.store(sums, grad_sum, mask=is_channel)  # narrow: 64 a program
    tl.store(sums + C, product_sum, mask=is_channel)  # narrow: 64 a program
    if SUMS > 2:
        # A shift of all pixels has the gradient dx + dsummed summed over the N pixels. The equation
        # of dx is linear in dz, dz v and v, so it holds for their sums.
        first, member = groups_of(block, CPG, C, TOUCHED, BLOCK)
        parts, _, known = slots_of_groups(
            sample, first, N, G, CPG, PIXEL_TILES, SPAN, SLOTS, TOUCHED, ROWS, BLOCK
        )
        half = B * G * PIXEL_TILES * SPAN
        plain = tl.sum(load_parts(group_sums + parts, known), axis=1) / (N * CPG)
        product = tl.sum(load_parts(group_sums + half + parts, known), axis=1) / (N * CPG)
        groups = first + tl.arange(0, TOUCHED)
        group_rstd = tl.load(rstd + sample * G + groups, mask=groups < G, other=0.0)  # narrow: few
        value_sum = tl.sum(load_parts(of_tiles + 2 * C, exists), axis=0)[None, :]
        grad = (grad_sum * load_by_channel(weight, channels, C))[None, :]
        grad -= N * to_channels(plain, member) + value_sum * to_channels(product, member)
        grad *= to_channels(group_rstd, member)
        if SUMS > 3:
            grad += tl.sum(load_parts(of_tiles + 3 * C, exists), axis=0)[None, :]
        to_shift = dshift + sample * dshift_stride + channels[None, :]
        tl.store(to_shift, grad, mask=(channels < C1)[None, :])  # narrow: 64 a program
    # See `arrive`. Whoever comes last finds the sums of all samples, and adds them in their order.
    tl.debug_barrier()
    arrived = tl.atomic_add(counters + 1 + B + block, 1, sem="acq_rel")  # narrow: a counter
    if arrived % B == B - 1:
        for row in tl.static_range(OUT):
            total = tl.zeros((SAMPLES, BLOCK), tl.float32)
            for start in tl.range(0, B, SAMPLES):
                samples = start + tl.arange(0, SAMPLES)[:, None]
                of_samples = sample_sums + (samples * OUT + row) * C + channels[None, :]
                total += load_parts(of_samples, (samples < B) & is_channel[None, :])
            to_vector = vectors + row * C + channels
            tl.store(to_vector, tl.sum(total, axis=0), mask=is_channel)  # narrow: once a block


# Each batch size would otherwise be compiled anew where it is 1, or first a multiple of 16.
@triton.jit(do_not_specialize=["B"])
def group_norm_backward_kernel(
    x, skip, shift, residual, weight, bias, mean, rstd, dy, dsummed, dagain, dx, dskip, dshift,
    vectors, counters, group_sums, channel_sums, sample_sums, B, x_stride, x_pixel, skip_stride,
    skip_pixel, shift_stride, residual_stride, residual_pixel, dy_stride, dy_pixel, dsummed_stride,
    dsummed_pixel, dagain_stride, dagain_pixel, dshift_stride, N: tl.constexpr, C1: tl.constexpr,
    C: tl.constexpr, G: tl.constexpr, SILU: tl.constexpr, SUMS: tl.constexpr, OUT: tl.constexpr,
    ITEMS: tl.constexpr, LAG: tl.constexpr, PIXEL_TILES: tl.constexpr, SPAN: tl.constexpr,
    SLOTS: tl.constexpr, PARTS: tl.constexpr, TOUCHED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    CPG: tl.constexpr = C // G
    # Channels of x: what forward returned holds both sources.
    WIDTH: tl.constexpr = C if skip is None else C1
    BLOCKS: tl.constexpr = ITEMS // PIXEL_TILES
    sample, item, exists, launches = take_item(counters, B, ITEMS, BLOCKS, LAG)
    if not exists:
        return
    if item >= 2 * ITEMS:
        wait(counters, sample, launches, ITEMS)
        _add_up(
            *(group_sums, channel_sums, weight, rstd, dshift, sample_sums, vectors, counters),
            *(sample, item - 2 * ITEMS, B, dshift_stride, N, C1, C, G, SUMS, OUT, PIXEL_TILES),
            *(SPAN, SLOTS, PARTS, TOUCHED, ROWS, BLOCK, SAMPLES),
        )
        return
    is_result, item = item >= ITEMS, item % ITEMS
    tile, block = item % PIXEL_TILES, item // PIXEL_TILES
    rows = tile * ROWS + tl.arange(0, ROWS)
    channels = block * BLOCK + tl.arange(0, BLOCK)
    # Tiles at the last pixels and channels reach past the image.
    inside = (rows < N)[:, None] & (channels < C)[None, :]
    first, member = groups_of(block, CPG, C, TOUCHED, BLOCK)
    groups = first + tl.arange(0, TOUCHED)
    is_group = groups < G
    group_mean = tl.load(mean + sample * G + groups, mask=is_group, other=0.0)  # narrow: few
    group_rstd = tl.load(rstd + sample * G + groups, mask=is_group, other=0.0)  # narrow: few
    scale = load_by_channel(weight, channels, C)[None, :]
    offset = load_by_channel(bias, channels, C)[None, :]
    at = (sample, rows, channels)
    of_x = (x_stride, x_pixel, skip_stride, skip_pixel)
    layout = of_x + (shift_stride, residual_stride, residual_pixel)  # noqa: RUF005
    # Read before a result waits, so that the wait hides the reads; kept as read meanwhile, in half
    # the registers.
    raw = load_sources(x, skip, layout, at, inside, WIDTH, "")
    raw_grad = load_raw(dy, dy_stride, dy_pixel, at, inside, 0.0, "")
    centre, channel_rstd = to_channels(group_mean, member), to_channels(group_rstd, member)
    later = (dsummed_stride, dsummed_pixel, dagain_stride, dagain_pixel)
    # The first half of group_sums holds sums of w dz, the second those of w dz v.
    half = B * G * PIXEL_TILES * SPAN
    if is_result:
        wait(counters, sample, launches, ITEMS)
        place, _, known = slots_of_groups(
            sample, first, N, G, CPG, PIXEL_TILES, SPAN, SLOTS, TOUCHED, ROWS, BLOCK
        )
        # Both are loaded before either is summed, so that both loads are in flight.
        plain = load_parts(group_sums + place, known)
        product = load_parts(group_sums + half + place, known)
        plain_mean = to_channels(tl.sum(plain, axis=1) / (N * CPG), member)
        product_mean = to_channels(tl.sum(product, axis=1) / (N * CPG), member)
        # Both sweeps compute v and dz: storing them would cost a write and a read of device memory.
        value = (sum_of(raw, shift, residual, layout, at, inside, WIDTH) - centre) * channel_rstd
        grad = _before_silu(value * scale + offset, raw_grad.to(tl.float32), SILU)
        # The equation at the top of this file.
        grad = (grad * scale - plain_mean - value * product_mean) * channel_rstd
        if dsummed is not None:
            # The later uses: added here, not in a pass of their own.
            grad += _later_uses(dsummed, dagain, later, at, inside)
        store_pixels(dx, grad, at, C1, N, inside & (channels < C1)[None, :])
        if C1 < C:
            is_second = inside & (channels >= C1)[None, :]
            store_pixels(dskip, grad, (sample, rows, channels - C1), C - C1, N, is_second)
    else:
        value = (sum_of(raw, shift, residual, layout, at, inside, WIDTH) - centre) * channel_rstd
        grad = _before_silu(value * scale + offset, raw_grad.to(tl.float32), SILU)
        # Pixels and channels outside have a gradient of zero and add nothing.
        grad_sum, product_sum = tl.sum(grad, axis=0), tl.sum(grad * value, axis=0)
        parameter = tl.sum(scale, axis=0)
        weighted = (grad_sum * parameter, product_sum * parameter)
        of_tile = (sample, tile, block, first)
        _store_group_sums(
            group_sums, half, of_tile, weighted, member, G, CPG, PIXEL_TILES, SPAN, TOUCHED, BLOCK
        )
        sums = channel_sums + (sample.to(tl.int64) * PIXEL_TILES + tile) * SUMS * C + channels
        is_channel = channels < C
        tl.store(sums, grad_sum, mask=is_channel)  # narrow: 64 a program
        tl.store(sums + C, product_sum, mask=is_channel)  # narrow: 64 a program
        if SUMS > 2:
            # v outside is not zero: there it is -mean * rstd.
            normalised_sum = tl.sum(tl.where(inside, value, 0.0), axis=0)
            tl.store(sums + 2 * C, normalised_sum, mask=is_channel)  # narrow: 64 a program
        if SUMS > 3:
            # A shift is part of the sum, so it also gets the gradient of the sum.
            grad = _later_uses(dsummed, dagain, later, at, inside)
            tl.store(sums + 3 * C, tl.sum(grad, axis=0), mask=is_channel)  # narrow: 64 a program
        arrive(counters, sample)


@torch.library.custom_op("sd_kernels::group_norm_backward", mutates_args=())
def group_norm_backward(
    dy: torch.Tensor,
    dsummed: list[torch.Tensor],
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
    skip: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    C1: int,
    silu: bool,
    shift_axes: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x (and residual), of skip, of the vectors by channel, and of a shift (B, C1).

    x is what forward returned as the sum, or, with shift, residual and skip, its parts. Of its
    gradient C1 channels are that of x, the others that of skip. `dsummed` are up to two gradients
    of the sum, from where it is read later. The vectors are rows of one tensor (2 or 3, C), in the
    dtype of the weight: bias, weight and, where `shift_axes` is 1, the shift (C1,) in its first C1
    columns. The gradient of a shift (B, C1) is empty unless `shift_axes` is 2, that of no skip too.
    """
    B, _, H, W = x.shape
    C, N, G = weight.shape[0], H * W, mean.shape[1]
    launch_plan = plan(B, N, C, G, TUNING.backward_rows, adds_up=True)
    sizes, blocks = launch_plan.sizes, triton.cdiv(C, TUNING.block)
    pixel_tiles = sizes["PIXEL_TILES"]
    dx = empty(x, (B, H, W, C1)).permute(0, 3, 1, 2)
    dskip = empty(x, (B, H, W, C - C1)).permute(0, 3, 1, 2)
    # The ticket counter, finished tiles of each sample, and finished samples of each block.
    tickets = counters(x, 1 + B + blocks, group_norm_backward_kernel, B, *sizes.values())
    group_sums = empty(x, (2, B, G, pixel_tiles, sizes["SPAN"]), torch.float32)
    # Sums over pixels of dz, dz v and, for the gradient of shift, v and dsummed.
    sums = (4 if dsummed else 3) if shift_axes else 2
    channel_sums = empty(x, (B, pixel_tiles, sums, C), torch.float32)
    rows = 3 if shift_axes == 1 else 2
    sample_sums, vectors = empty(x, (B, rows, C), torch.float32), empty(weight, (rows, C))
    # A shift of all samples is summed over them as bias and weight are.
    dshift = sample_sums[:, 2] if shift_axes == 1 else empty(x, (B, C1) if shift_axes else (0,))
    # Gradients may come in any memory order.
    incoming: list[torch.Tensor | None] = [dense(dy), *map(dense, dsummed), None, None][:3]
    sources, results = (x, skip, shift, residual), (dx, dskip, dshift, vectors)
    tensors = *sources, weight, bias, mean, rstd, *incoming, *results
    launch(
        group_norm_backward_kernel,
        (launch_plan.programs,),
        *(*tensors, tickets, group_sums, channel_sums, sample_sums, B),
        *(*source_strides(*sources), *strides(*incoming), dshift.stride(0)),
        C1=C1,
        SILU=silu,
        SUMS=sums,
        OUT=rows,
        PARTS=triton.next_power_of_2(pixel_tiles),
        SAMPLES=TUNING.samples,
        **sizes,
        num_warps=launch_plan.num_warps,
    )
    of_samples = rounded(dshift, x.dtype) if shift_axes == 2 else x.new_empty(0)
    return rounded(dx, x.dtype), rounded(dskip, x.dtype), rounded(vectors, weight.dtype), of_samples


@group_norm_backward.register_fake
def _(dy, dsummed, x, weight, bias, shift, residual, skip, mean, rstd, C1, silu, shift_axes):
    B, _, H, W = x.shape
    C = weight.shape[0]
    dx, dskip = (x.new_empty(B, H, W, width).permute(0, 3, 1, 2) for width in (C1, C - C1))
    vectors = weight.new_empty(3 if shift_axes == 1 else 2, C)
    return dx, dskip, vectors, x.new_empty((B, C1) if shift_axes == 2 else 0)
