"""Group normalisation backward: one launch that reads x and dy once from device memory.

With v the normalised value, w the weight and dz the gradient of what went into SiLU (the derivation
is that of Ioffe and Szegedy, "Batch Normalization", 2015, section 3, with a group for the batch):

    dx = rstd * (w dz - mean(w dz) - v mean(w dz v))    means over a group
    dweight = sum(dz v), dbias = sum(dz)                sums over samples and pixels

The first sweep sums w dz and w dz v of each tile by group, and dz and dz v by channel. The second
combines them. All sums have a fixed order, so that gradients are repeatable. Per element the launch
moves two reads (x, dy) and one write; the gradient of each later use of the sum or of skip is one
more read. A second, small launch adds the sums by channel.

Shape letters and sizes: see `tiles`.
"""

from __future__ import annotations

from collections.abc import Mapping

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
from sd_kernels.launch import empty, launch, rounded


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


# Each batch size would otherwise be compiled anew where it is 1, or first a multiple of 16.
@triton.jit(do_not_specialize=["B"])
def group_norm_backward_kernel(
    x, skip, shift, residual, weight, bias, mean, rstd, dy, dsummed, dagain, dlater, dx, dskip,
    counters, group_sums, channel_sums, B, x_stride, x_pixel, skip_stride, skip_pixel,
    shift_stride, residual_stride, residual_pixel, dy_stride, dy_pixel, dsummed_stride,
    dsummed_pixel, dagain_stride, dagain_pixel, dlater_stride, dlater_pixel, N: tl.constexpr,
    C1: tl.constexpr, C: tl.constexpr, G: tl.constexpr, SILU: tl.constexpr, SUMS: tl.constexpr,
    ITEMS: tl.constexpr, LAG: tl.constexpr, PIXEL_TILES: tl.constexpr, SPAN: tl.constexpr,
    SLOTS: tl.constexpr, TOUCHED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    CPG: tl.constexpr = C // G
    sample, item, is_result, exists = take_item(counters, B, ITEMS, LAG)
    if not exists:
        return
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
    layout = (
        x_stride,
        x_pixel,
        skip_stride,
        skip_pixel,
        shift_stride,
        residual_stride,
        residual_pixel,
    )
    # Read before a result waits, so that the wait hides the reads; kept as read meanwhile, in half
    # the registers.
    raw = load_sources(x, skip, layout, at, inside, C1, "")
    raw_grad = load_raw(dy, dy_stride, dy_pixel, at, inside, 0.0, "")
    centre, channel_rstd = to_channels(group_mean, member), to_channels(group_rstd, member)
    is_first = inside & (channels < C1)[None, :]
    later = (dsummed_stride, dsummed_pixel, dagain_stride, dagain_pixel)
    # The first half of group_sums holds sums of w dz, the second those of w dz v.
    half = B * G * PIXEL_TILES * SPAN
    if is_result:
        wait(counters, sample, ITEMS)
        place, _, known = slots_of_groups(
            sample, first, N, G, CPG, PIXEL_TILES, SPAN, SLOTS, TOUCHED, ROWS, BLOCK
        )
        # Both are loaded before either is summed, so that both loads are in flight.
        plain = load_parts(group_sums + place, known)
        product = load_parts(group_sums + half + place, known)
        plain_mean = to_channels(tl.sum(plain, axis=1) / (N * CPG), member)
        product_mean = to_channels(tl.sum(product, axis=1) / (N * CPG), member)
        # Both sweeps compute v and dz: storing them would cost a write and a read of device memory.
        value = (sum_of(raw, shift, residual, layout, at, inside, C1) - centre) * channel_rstd
        grad = _before_silu(value * scale + offset, raw_grad.to(tl.float32), SILU)
        # The equation at the top of this file.
        grad = (grad * scale - plain_mean - value * product_mean) * channel_rstd
        if dsummed is not None:
            # The later uses of the sum and of skip: added here, not in a pass of their own.
            grad += _later_uses(dsummed, dagain, later, at, is_first)
        store_pixels(dx, grad, at, C1, N, is_first)
        if skip is not None:
            is_second = inside & (channels >= C1)[None, :]
            at = (sample, rows, channels - C1)
            if dlater is not None:
                grad += load_pixels(dlater, dlater_stride, dlater_pixel, at, is_second)
            store_pixels(dskip, grad, at, C - C1, N, is_second)
    else:
        value = (sum_of(raw, shift, residual, layout, at, inside, C1) - centre) * channel_rstd
        grad = _before_silu(value * scale + offset, raw_grad.to(tl.float32), SILU)
        # Pixels and channels outside have a gradient of zero and add nothing.
        grad_sum, product_sum = tl.sum(grad, axis=0), tl.sum(grad * value, axis=0)
        parameter = tl.sum(scale, axis=0)
        slot, is_slot = slots_of_tile(
            sample, tile, block, first, G, CPG, PIXEL_TILES, SPAN, TOUCHED, BLOCK
        )
        plain_place, product_place = group_sums + slot, group_sums + half + slot
        tl.store(plain_place, to_groups(grad_sum * parameter, member), mask=is_slot)  # narrow: few
        weighted = to_groups(product_sum * parameter, member)
        tl.store(product_place, weighted, mask=is_slot)  # narrow: few numbers
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
            grad = _later_uses(dsummed, dagain, later, at, is_first)
            tl.store(sums + 3 * C, tl.sum(grad, axis=0), mask=is_channel)  # narrow: 64 a program
        arrive(counters, sample)


@triton.jit(do_not_specialize=["B"])
def group_norm_finish_kernel(
    group_sums, channel_sums, weight, rstd, dshift, sample_sums, vectors, counters, B,
    dshift_stride, N: tl.constexpr, C1: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
    SUMS: tl.constexpr, OUT: tl.constexpr, PIXEL_TILES: tl.constexpr, SPAN: tl.constexpr,
    SLOTS: tl.constexpr, PARTS: tl.constexpr, TOUCHED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, SAMPLES: tl.constexpr,
):  # fmt: skip
    # Sums of one sample and block over its tiles; the last sample's program adds the samples up.
    CPG: tl.constexpr = C // G
    sample, block = tl.program_id(0) % B, tl.program_id(0) // B
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
    if arrived == B - 1:
        for row in tl.static_range(OUT):
            total = tl.zeros((SAMPLES, BLOCK), tl.float32)
            for start in tl.range(0, B, SAMPLES):
                samples = start + tl.arange(0, SAMPLES)[:, None]
                of_samples = sample_sums + (samples * OUT + row) * C + channels[None, :]
                total += load_parts(of_samples, (samples < B) & is_channel[None, :])
            to_vector = vectors + row * C + channels
            tl.store(to_vector, tl.sum(total, axis=0), mask=is_channel)  # narrow: once a block


@torch.library.custom_op("sd_kernels::group_norm_backward", mutates_args=())
def group_norm_backward(
    dy: torch.Tensor,
    dsummed: list[torch.Tensor],
    dlater: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
    skip: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    silu: bool,
    shift_axes: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x (and residual), of skip, of the vectors by channel, and of a shift (B, C1).

    `dsummed` are up to two gradients of the sum, `dlater` one of skip, from where they are read
    later. The vectors are rows of one tensor (2 or 3, C), in the dtype of the weight: bias, weight
    and, where `shift_axes` is 1, the shift (C1,) in its first C1 columns. The gradient of a shift
    (B, C1) is empty unless `shift_axes` is 2; that of an absent skip has no channels.
    """
    B, C1, H, W = x.shape
    C, N, G = weight.shape[0], H * W, mean.shape[1]
    launch_plan = plan(B, N, C, G, TUNING.backward_rows)
    pixel_tiles, span = (launch_plan.sizes[name] for name in ("PIXEL_TILES", "SPAN"))
    dx = empty(x, (B, H, W, C1)).permute(0, 3, 1, 2)
    dskip = empty(x, (B, H, W, C - C1)).permute(0, 3, 1, 2)
    blocks = triton.cdiv(C, TUNING.block)
    # The ticket counter, the finished tiles of each sample, and the finished samples of each block.
    counters = torch.zeros(1 + B + blocks, dtype=torch.int32, device=x.device)
    group_sums = empty(x, (2, B, G, pixel_tiles, span), torch.float32)
    # Sums over pixels of dz, dz v and, for the gradient of shift, v and dsummed.
    sums = (4 if dsummed else 3) if shift_axes else 2
    channel_sums = empty(x, (B, pixel_tiles, sums, C), torch.float32)
    # Gradients may come in any memory order.
    later: list[torch.Tensor | None] = [*map(dense, dsummed), None, None][:2]
    incoming = [dense(dy), *later, None if dlater is None else dense(dlater)]
    sources = x, skip, shift, residual
    tensors = *sources, weight, bias, mean, rstd, *incoming, dx, dskip
    launch(
        group_norm_backward_kernel,
        (launch_plan.programs,),
        *(*tensors, counters, group_sums, channel_sums, B),
        *(*source_strides(*sources), *strides(*incoming)),
        C1=C1,
        SILU=silu,
        SUMS=sums,
        **launch_plan.sizes,
        num_warps=launch_plan.num_warps,
    )
    scratch = group_sums, channel_sums, counters
    finished = _finish(x, weight, rstd, *scratch, shift_axes=shift_axes, sizes=launch_plan.sizes)
    return rounded(dx, x.dtype), rounded(dskip, x.dtype), *finished


def _finish(
    x: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    group_sums: torch.Tensor,
    channel_sums: torch.Tensor,
    counters: torch.Tensor,
    *,
    shift_axes: int,
    sizes: Mapping[str, int],
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last two results of `group_norm_backward`, from the sums of its tiles."""
    (B, C1), (_, pixel_tiles, sums, C) = x.shape[:2], channel_sums.shape
    rows = 3 if shift_axes == 1 else 2
    sample_sums = empty(x, (B, rows, C), torch.float32)
    vectors = empty(weight, (rows, C))
    # A shift of all samples is summed over them as bias and weight are.
    dshift = sample_sums[:, 2] if shift_axes == 1 else empty(x, (B, C1) if shift_axes else (0,))
    launch(
        group_norm_finish_kernel,
        (B * triton.cdiv(C, TUNING.block),),
        *(group_sums, channel_sums, weight, rstd, dshift, sample_sums, vectors, counters, B),
        dshift.stride(0),
        C1=C1,
        SUMS=sums,
        OUT=rows,
        PARTS=triton.next_power_of_2(pixel_tiles),
        SAMPLES=TUNING.samples,
        **{name: size for name, size in sizes.items() if name not in ("ITEMS", "LAG")},
    )
    of_samples = rounded(dshift, x.dtype) if shift_axes == 2 else x.new_empty(0)
    return rounded(vectors, weight.dtype), of_samples


@group_norm_backward.register_fake
def _(dy, dsummed, dlater, x, weight, bias, shift, residual, skip, mean, rstd, silu, shift_axes):
    B, C1, H, W = x.shape
    C = weight.shape[0]
    dx, dskip = (x.new_empty(B, H, W, width).permute(0, 3, 1, 2) for width in (C1, C - C1))
    vectors = weight.new_empty(3 if shift_axes == 1 else 2, C)
    return dx, dskip, vectors, x.new_empty((B, C1) if shift_axes == 2 else 0)
