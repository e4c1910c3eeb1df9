"""Group normalisation backward: one launch that reads x and dy once from device memory.

With v the normalised value, w the weight and dz the gradient of what went into SiLU (the derivation
is that of Ioffe and Szegedy, "Batch Normalization", 2015, section 3, with a group for the batch):

    dx = rstd * (w dz - mean(w dz) - v mean(w dz v))    means over a group
    dweight = sum(dz v), dbias = sum(dz)                sums over samples and pixels

The first sweep sums w dz and w dz v of each tile by group, and dz and dz v by channel. The second
combines them. All sums have a fixed order, so that gradients are repeatable. Per element the launch
moves two reads (x, dy) and one write.

Shape letters and sizes: see `tiles`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sd_kernels.group_norm.rows import dense
from sd_kernels.group_norm.tiles import (
    arrive,
    groups_of,
    load_by_channel,
    load_parts,
    load_pixels,
    load_source,
    plan,
    slots_of_groups,
    slots_of_tile,
    source_strides,
    store_pixels,
    strides,
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
        gate = tl.sigmoid(value)
        grad = grad * gate * (1.0 + value * (1.0 - gate))
    return grad


@triton.jit
def group_norm_backward_kernel(
    x, skip, shift, residual, weight, bias, mean, rstd, dy, dsummed, dx, dskip, counters,
    group_sums, channel_sums, B, x_stride, x_pixel, skip_stride, skip_pixel, shift_stride,
    residual_stride, residual_pixel, dy_stride, dy_pixel, dsummed_stride, dsummed_pixel,
    N: tl.constexpr, C1: tl.constexpr, C: tl.constexpr, G: tl.constexpr, SILU: tl.constexpr,
    SUMS: tl.constexpr, ITEMS: tl.constexpr, LAG: tl.constexpr, PIXEL_TILES: tl.constexpr,
    SPAN: tl.constexpr, SLOTS: tl.constexpr, TOUCHED: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
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
    value = load_source(x, skip, shift, residual, layout, at, inside, C1, "")
    grad = load_pixels(dy, dy_stride, dy_pixel, at, inside, "")
    # Both sweeps compute v and dz: storing them would cost a write and a read of device memory.
    value = (value - to_channels(group_mean, member)) * to_channels(group_rstd, member)
    grad = _before_silu(value * scale + offset, grad, SILU)
    is_first = inside & (channels < C1)[None, :]
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
        # The equation at the top of this file.
        grad = grad * scale - plain_mean - value * product_mean
        grad = grad * to_channels(group_rstd, member)
        if dsummed is not None:
            # The later uses of the sum: added here, not in a pass of its own.
            grad += load_pixels(dsummed, dsummed_stride, dsummed_pixel, at, is_first, "")
        store_pixels(dx, grad, at, C1, N, is_first)
        if skip is not None:
            is_second = inside & (channels >= C1)[None, :]
            store_pixels(dskip, grad, (sample, rows, channels - C1), C - C1, N, is_second)
    else:
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
            grad = load_pixels(dsummed, dsummed_stride, dsummed_pixel, at, is_first, "")
            tl.store(sums + 3 * C, tl.sum(grad, axis=0), mask=is_channel)  # narrow: 64 a program
        arrive(counters, sample)


@torch.library.custom_op("sd_kernels::group_norm_backward", mutates_args=())
def group_norm_backward(
    dy: torch.Tensor,
    dsummed: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
    skip: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    silu: bool,
    shift_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x (and residual), skip, weight, bias and shift, all in the dtype of x.

    The gradient of shift is empty without `shift_gradient`, that of an absent skip has no channels.
    """
    B, C1, H, W = x.shape
    C, N, G = weight.shape[0], H * W, mean.shape[1]
    launch_plan = plan(B, N, C, G)
    pixel_tiles, span = (launch_plan.sizes[name] for name in ("PIXEL_TILES", "SPAN"))
    dx = empty(x, (B, H, W, C1)).permute(0, 3, 1, 2)
    dskip = empty(x, (B, H, W, C - C1)).permute(0, 3, 1, 2)
    # The ticket counter, then the finished tiles of each sample.
    counters = torch.zeros(1 + B, dtype=torch.int32, device=x.device)
    group_sums = empty(x, (2, B, G, pixel_tiles, span), torch.float32)
    # Sums over pixels of dz, dz v and, for the gradient of shift, v and dsummed.
    sums = (4 if dsummed is not None else 3) if shift_gradient else 2
    channel_sums = empty(x, (B, pixel_tiles, sums, C), torch.float32)
    dy, dsummed = dense(dy), None if dsummed is None else dense(dsummed)
    sources, gradients = (x, skip, shift, residual), (dy, dsummed, dx, dskip)
    inputs, scratch = (*sources, weight, bias, mean, rstd), (counters, group_sums, channel_sums)
    launch(
        group_norm_backward_kernel,
        (launch_plan.programs,),
        *(*inputs, *gradients, *scratch, B, *source_strides(*sources), *strides(dy, dsummed)),
        C1=C1,
        SILU=silu,
        SUMS=sums,
        **launch_plan.sizes,
        num_warps=launch_plan.num_warps,
    )
    by_sample = channel_sums.sum(1)
    dbias, dweight = (by_sample[:, i].sum(0).to(weight.dtype) for i in range(2))
    dshift = x.new_empty(0)
    if shift_gradient:
        dshift = _shift_gradient(by_sample, weight, rstd, N)[:, :C1].to(x.dtype).contiguous()
    return rounded(dx, x.dtype), rounded(dskip, x.dtype), dweight, dbias, dshift


def _shift_gradient(
    sums: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, N: int
) -> torch.Tensor:
    """Gradient (B, C) of a shift of all pixels: dx + dsummed summed over the N pixels.

    From the sums (B, 3 or 4, C) over pixels of dz, dz v, v and perhaps dsummed. The equation of dx
    (see the top of this file) is linear in dz, dz v and v, so it holds for their sums.
    """
    (B, G), C = rstd.shape, weight.shape[0]
    scaled = sums[:, :2] * weight.float()
    means = scaled.view(B, 2, G, -1).sum(-1, keepdim=True) / (N * (C // G))
    plain, product = means.expand(-1, -1, -1, C // G).reshape(B, 2, C).unbind(1)
    channel_rstd = rstd.repeat_interleave(C // G, dim=1)
    shift = (scaled[:, 0] - N * plain - sums[:, 2] * product) * channel_rstd
    return shift if sums.shape[1] == 3 else shift + sums[:, 3]


@group_norm_backward.register_fake
def _(dy, dsummed, x, weight, bias, shift, residual, skip, mean, rstd, silu, shift_gradient):
    B, C1, H, W = x.shape
    C = weight.shape[0]
    dx, dskip = (x.new_empty(B, H, W, width).permute(0, 3, 1, 2) for width in (C1, C - C1))
    dshift = x.new_empty(B, C1) if shift_gradient else x.new_empty(0)
    return dx, dskip, weight.new_empty(C), weight.new_empty(C), dshift
