"""Group normalisation in one launch each way that reads device memory once.

Two sweeps are inherent: statistics first, then the result. A program does one item: statistics of a
tile of a sample (ROWS pixels x BLOCK channels), or the result of one. Items are handed out by a
ticket counter in an order in which a sample's results follow LAG samples behind its statistics: by
then the statistics are there, hardly a program waits, and the tile is read again from the L2 cache,
not from memory. A program waits only for items with lower tickets, which are done or running, so
that none waits for ever. Passes over device memory: forward 1 read, 1 write (a residual: 1 more
read, handed on: 1 more write); backward 2 reads (x, dy), 1 write. Apex's Hopper kernels take one
more read forward above 1,024 pixels, and two more backward.

A tile's statistics are its own mean and sum of squared deviations, for each group that it touches;
a group may lie in several blocks of channels, and blocks in two sources. Results combine them by
Chan, Golub and LeVeque (1983), always in the same order. Weight gradients are sums of per-tile
sums, in a fixed order too.

Shape letters: B samples, N pixels, C = C1 + C2 channels of both sources, G groups of CPG channels,
P tiles of pixels a sample, S blocks of channels that a group can lie in, L groups that a block can
touch, K = P * blocks items.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sd_kernels.errors import require
from sd_kernels.group_norm.checks import check
from sd_kernels.group_norm.rows import dense, is_channels_last, pixel_stride
from sd_kernels.launch import empty, interpreted, launch, rounded

BLOCK = 64
"""channels of a tile: every width of the UNet is a multiple, and 8 threads read a pixel's by 16
bytes each"""
MAX_ROWS = 128
WINDOW = 512
"""items between a sample's statistics and its results: about those that a Hopper GPU runs at a
time"""


@triton.jit
def _item(counters, B, K: tl.constexpr, LAG: tl.constexpr):
    """Take a ticket: (sample, item of the sample, whether it is a result, whether there is such a
    sample)."""
    ticket = tl.atomic_add(counters, 1)
    turn, slot = ticket // (2 * K), ticket % (2 * K)
    is_result = slot >= K
    sample = turn - tl.where(is_result, LAG, 0)
    return sample, tl.where(is_result, slot - K, slot), is_result, (sample >= 0) & (sample < B)


@triton.jit
def _arrive(counters, sample):
    tl.debug_barrier()
    tl.atomic_add(counters + 1 + sample, 1, sem="acq_rel")


@triton.jit
def _wait(counters, sample, K: tl.constexpr):
    while tl.atomic_add(counters + 1 + sample, 0, sem="acquire") < K:  # narrow: a counter
        pass


@triton.jit
def _groups_of(block, CPG: tl.constexpr, C: tl.constexpr, L: tl.constexpr, BLOCK: tl.constexpr):
    """First group that a block touches, and which of its channels (BLOCK, L) belong to which."""
    channels = block * BLOCK + tl.arange(0, BLOCK)
    first = block * BLOCK // CPG
    return first, ((channels // CPG - first)[:, None] == tl.arange(0, L)[None, :]) & (channels < C)[
        :, None
    ]


@triton.jit
def _to_groups(values, member):
    return tl.sum(tl.where(member, values[:, None], 0.0), axis=0)


@triton.jit
def _to_channels(values, member):
    return tl.sum(tl.where(member, values[None, :], 0.0), axis=1)


@triton.jit
def _slots(
    sample,
    tile,
    block,
    first,
    G: tl.constexpr,
    CPG: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    L: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where a tile leaves what it knows of its groups (L,), in an array (B, G, P, S), and which of
    them exist."""
    groups = first + tl.arange(0, L)
    return ((sample * G + groups) * P + tile) * S + block - groups * CPG // BLOCK, (groups < G) & (
        groups * CPG < (block + 1) * BLOCK
    )


@triton.jit
def _all_slots(
    sample,
    first,
    N: tl.constexpr,
    G: tl.constexpr,
    CPG: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    PS: tl.constexpr,
    L: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Everything that all tiles left of L groups (L, PS): where, how many elements each stands for,
    which exist."""
    groups = (first + tl.arange(0, L))[:, None]
    index = tl.arange(0, PS)[None, :]
    block = groups * CPG // BLOCK + index % S
    channels = tl.minimum((block + 1) * BLOCK, (groups + 1) * CPG) - tl.maximum(
        block * BLOCK, groups * CPG
    )
    pixels = tl.minimum(N - index // S * ROWS, ROWS)
    exists = (groups < G) & (index < P * S) & (channels > 0)
    return (sample * G + groups) * P * S + index, (channels * pixels).to(tl.float32), exists


@triton.jit
def _read(pointer, sample, stride, pixel, rows, channels, inside, CACHE: tl.constexpr):
    place = pointer + sample.to(tl.int64) * stride + rows[:, None] * pixel + channels[None, :]
    return tl.load(place, mask=inside, other=0.0, cache_modifier=CACHE).to(tl.float32)


@triton.jit
def _source(
    x,
    skip,
    shift,
    residual,
    sample,
    rows,
    channels,
    inside,
    x_stride,
    x_pixel,
    skip_stride,
    skip_pixel,
    shift_stride,
    residual_stride,
    residual_pixel,
    C1: tl.constexpr,
    CACHE: tl.constexpr,
):
    """The tile (ROWS, BLOCK) that is normalised: x + shift + residual, or the second source, in
    float32.

    CACHE is ".cg" where x was written by another program of this launch: the first-level cache may
    hold older bytes.
    """
    first = inside & (channels < C1)[None, :]
    value = _read(x, sample, x_stride, x_pixel, rows, channels, first, CACHE)
    if shift is not None:
        place = shift + sample.to(tl.int64) * shift_stride + channels
        added = tl.load(place, mask=channels < C1, other=0.0).to(tl.float32)  # narrow: 64 a program
        value += tl.where(first, added[None, :], 0.0)
    if residual is not None:
        value += _read(residual, sample, residual_stride, residual_pixel, rows, channels, first, "")
    if skip is not None:
        second = inside & (channels >= C1)[None, :]
        value += _read(skip, sample, skip_stride, skip_pixel, rows, channels - C1, second, "")
    return value


@triton.jit
def _parameters(weight, bias, channels, C: tl.constexpr):
    scale = tl.load(weight + channels, mask=channels < C, other=0.0).to(
        tl.float32
    )  # narrow: 64 a program
    offset = tl.load(bias + channels, mask=channels < C, other=0.0).to(
        tl.float32
    )  # narrow: 64 a program
    return scale[None, :], offset[None, :]


@triton.jit
def group_norm_forward_kernel(
    x,
    skip,
    shift,
    residual,
    weight,
    bias,
    y,
    summed,
    mean,
    rstd,
    counters,
    means,
    deviations,
    B,
    eps,
    x_stride,
    x_pixel,
    skip_stride,
    skip_pixel,
    shift_stride,
    residual_stride,
    residual_pixel,
    N: tl.constexpr,
    C1: tl.constexpr,
    C: tl.constexpr,
    G: tl.constexpr,
    SILU: tl.constexpr,
    K: tl.constexpr,
    LAG: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    PS: tl.constexpr,
    L: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    CPG: tl.constexpr = C // G
    sample, item, is_result, exists = _item(counters, B, K, LAG)
    if not exists:
        return
    tile, block = item % P, item // P
    rows = tile * ROWS + tl.arange(0, ROWS)
    channels = block * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < N)[:, None] & (channels < C)[None, :]
    first, member = _groups_of(block, CPG, C, L, BLOCK)
    groups = first + tl.arange(0, L)
    if summed is None:
        value = _source(
            x,
            skip,
            shift,
            residual,
            sample,
            rows,
            channels,
            inside,
            x_stride,
            x_pixel,
            skip_stride,
            skip_pixel,
            shift_stride,
            residual_stride,
            residual_pixel,
            C1,
            "",
        )
    if is_result:
        _wait(counters, sample, K)
        where, count, known = _all_slots(sample, first, N, G, CPG, P, S, PS, L, ROWS, BLOCK)
        tile_mean = tl.load(
            means + where, mask=known, other=0.0, cache_modifier=".cg"
        )  # narrow: few
        tile_deviation = tl.load(
            deviations + where, mask=known, other=0.0, cache_modifier=".cg"
        )  # narrow: few
        count = tl.where(known, count, 0.0)
        # Means are averaged as distances from the first, which loses nothing where they are far
        # from zero.
        origin = tl.sum(tl.where(tl.arange(0, PS)[None, :] == 0, tile_mean, 0.0), axis=1)
        group_mean = origin + tl.sum(count * (tile_mean - origin[:, None]), axis=1) / (N * CPG)
        offset = tl.where(known, tile_mean - group_mean[:, None], 0.0)
        group_rstd = tl.rsqrt(
            tl.sum(tile_deviation + count * offset * offset, axis=1) / (N * CPG) + eps
        )
        if tile == 0:
            # The block that holds a group's first channel says what its statistics are.
            says = (groups < G) & (groups * CPG // BLOCK == block)
            tl.store(mean + sample * G + groups, group_mean, mask=says)  # narrow: few
            tl.store(rstd + sample * G + groups, group_rstd, mask=says)  # narrow: few
        if summed is not None:
            value = _source(
                summed,
                skip,
                None,
                None,
                sample,
                rows,
                channels,
                inside,
                N * C1,
                C1,
                skip_stride,
                skip_pixel,
                0,
                0,
                0,
                C1,
                ".cg",
            )
        scale, offset = _parameters(weight, bias, channels, C)
        value = (value - _to_channels(group_mean, member)[None, :]) * _to_channels(
            group_rstd, member
        )[None, :]
        value = value * scale + offset
        if SILU:
            value = value * tl.sigmoid(value)
        place = y + sample.to(tl.int64) * N * C + rows[:, None] * C + channels[None, :]
        tl.store(place, value, mask=inside)
    else:
        if summed is not None:
            value = _source(
                x,
                skip,
                shift,
                residual,
                sample,
                rows,
                channels,
                inside,
                x_stride,
                x_pixel,
                skip_stride,
                skip_pixel,
                shift_stride,
                residual_stride,
                residual_pixel,
                C1,
                "",
            )
            # What is handed on is rounded, and it is that which is normalised.
            handed = value.to(summed.dtype.element_ty)
            handed_place = (
                summed + sample.to(tl.int64) * N * C1 + rows[:, None] * C1 + channels[None, :]
            )
            tl.store(handed_place, handed, mask=inside & (channels < C1)[None, :])
            value = handed.to(tl.float32)
        width = tl.sum(tl.where(member, 1.0, 0.0), axis=0)
        elements = tl.maximum(width * tl.minimum(N - tile * ROWS, ROWS), 1.0)
        own_mean = _to_groups(tl.sum(value, axis=0), member) / elements
        difference = tl.where(inside, value - _to_channels(own_mean, member)[None, :], 0.0)
        own_mean += _to_groups(tl.sum(difference, axis=0), member) / elements
        own_deviation = _to_groups(tl.sum(difference * difference, axis=0), member)
        slot, is_slot = _slots(sample, tile, block, first, G, CPG, P, S, L, BLOCK)
        tl.store(means + slot, own_mean, mask=is_slot)  # narrow: few
        tl.store(deviations + slot, own_deviation, mask=is_slot)  # narrow: few
        _arrive(counters, sample)


@triton.jit
def _activation_gradient(value, grad, SILU: tl.constexpr):
    """Gradient with respect to what went into the activation, `value` (ROWS, BLOCK)."""
    if SILU:
        gate = tl.sigmoid(value)
        grad = grad * gate * (1.0 + value * (1.0 - gate))
    return grad


@triton.jit
def group_norm_backward_kernel(
    x,
    skip,
    shift,
    residual,
    weight,
    bias,
    mean,
    rstd,
    dy,
    dsummed,
    dx,
    dskip,
    counters,
    group_sums,
    channel_sums,
    B,
    x_stride,
    x_pixel,
    skip_stride,
    skip_pixel,
    shift_stride,
    residual_stride,
    residual_pixel,
    dy_stride,
    dy_pixel,
    dsummed_stride,
    dsummed_pixel,
    N: tl.constexpr,
    C1: tl.constexpr,
    C: tl.constexpr,
    G: tl.constexpr,
    SILU: tl.constexpr,
    SUMS: tl.constexpr,
    K: tl.constexpr,
    LAG: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    PS: tl.constexpr,
    L: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    CPG: tl.constexpr = C // G
    sample, item, is_result, exists = _item(counters, B, K, LAG)
    if not exists:
        return
    tile, block = item % P, item // P
    rows = tile * ROWS + tl.arange(0, ROWS)
    channels = block * BLOCK + tl.arange(0, BLOCK)
    inside = (rows < N)[:, None] & (channels < C)[None, :]
    first, member = _groups_of(block, CPG, C, L, BLOCK)
    groups = first + tl.arange(0, L)
    group_mean = tl.load(mean + sample * G + groups, mask=groups < G, other=0.0)  # narrow: few
    group_rstd = tl.load(rstd + sample * G + groups, mask=groups < G, other=0.0)  # narrow: few
    scale, offset = _parameters(weight, bias, channels, C)
    value = _source(
        x,
        skip,
        shift,
        residual,
        sample,
        rows,
        channels,
        inside,
        x_stride,
        x_pixel,
        skip_stride,
        skip_pixel,
        shift_stride,
        residual_stride,
        residual_pixel,
        C1,
        "",
    )
    grad = _read(dy, sample, dy_stride, dy_pixel, rows, channels, inside, "")
    value = (value - _to_channels(group_mean, member)[None, :]) * _to_channels(group_rstd, member)[
        None, :
    ]
    grad = _activation_gradient(value * scale + offset, grad, SILU)
    first_source = inside & (channels < C1)[None, :]
    # Half the group sums: of the gradient before the scale, and of its product with the normalised
    # value.
    half = B * G * P * S
    if is_result:
        _wait(counters, sample, K)
        where, _, known = _all_slots(sample, first, N, G, CPG, P, S, PS, L, ROWS, BLOCK)
        plain = tl.load(
            group_sums + where, mask=known, other=0.0, cache_modifier=".cg"
        )  # narrow: few
        product = tl.load(
            group_sums + half + where, mask=known, other=0.0, cache_modifier=".cg"
        )  # narrow: few
        plain_mean = _to_channels(tl.sum(plain, axis=1) / (N * CPG), member)[None, :]
        product_mean = _to_channels(tl.sum(product, axis=1) / (N * CPG), member)[None, :]
        grad = (grad * scale - plain_mean - value * product_mean) * _to_channels(
            group_rstd, member
        )[None, :]
        if dsummed is not None:
            grad += _read(
                dsummed, sample, dsummed_stride, dsummed_pixel, rows, channels, first_source, ""
            )
        place = dx + sample.to(tl.int64) * N * C1 + rows[:, None] * C1 + channels[None, :]
        tl.store(place, grad, mask=first_source)
        if skip is not None:
            C2: tl.constexpr = C - C1
            place = (
                dskip + sample.to(tl.int64) * N * C2 + rows[:, None] * C2 + (channels - C1)[None, :]
            )
            tl.store(place, grad, mask=inside & (channels >= C1)[None, :])
    else:
        # Pixels and channels outside read a gradient of zero.
        grad_sum, product_sum = tl.sum(grad, axis=0), tl.sum(grad * value, axis=0)
        parameter = tl.sum(scale, axis=0)
        slot, is_slot = _slots(sample, tile, block, first, G, CPG, P, S, L, BLOCK)
        tl.store(
            group_sums + slot, _to_groups(grad_sum * parameter, member), mask=is_slot
        )  # narrow: few
        tl.store(
            group_sums + half + slot, _to_groups(product_sum * parameter, member), mask=is_slot
        )  # narrow: few
        sums = channel_sums + (sample.to(tl.int64) * P + tile) * SUMS * C + channels
        tl.store(sums, grad_sum, mask=channels < C)  # narrow: 64 a program
        tl.store(sums + C, product_sum, mask=channels < C)  # narrow: 64 a program
        if SUMS > 2:
            normalised_sum = tl.sum(tl.where(inside, value, 0.0), axis=0)
            tl.store(sums + 2 * C, normalised_sum, mask=channels < C)  # narrow: 64 a program
        if SUMS > 3:
            handed = _read(
                dsummed, sample, dsummed_stride, dsummed_pixel, rows, channels, first_source, ""
            )
            tl.store(
                sums + 3 * C, tl.sum(handed, axis=0), mask=channels < C
            )  # narrow: 64 a program
        _arrive(counters, sample)


def _plan(B: int, N: int, C: int, G: int) -> tuple[dict[str, int], int, int]:
    """Compile-time sizes of a launch, its number of programs and of warps."""
    per_group = C // G
    rows = min(MAX_ROWS, triton.next_power_of_2(N))
    P, blocks = triton.cdiv(N, rows), triton.cdiv(C, BLOCK)
    S = (per_group + BLOCK - 2) // BLOCK + 1
    K = P * blocks
    lag = 1 if interpreted() else triton.cdiv(WINDOW, 2 * K)
    sizes = {
        "N": N,
        "C": C,
        "G": G,
        "K": K,
        "LAG": lag,
        "P": P,
        "S": S,
        "PS": triton.next_power_of_2(P * S),
    }
    L = triton.next_power_of_2(min(G, (BLOCK + per_group - 2) // per_group + 1))
    return (
        {**sizes, "L": L, "ROWS": rows, "BLOCK": BLOCK},
        2 * K * (B + lag),
        8 if rows == MAX_ROWS else 4,
    )


def _strides(*images: torch.Tensor | None) -> list[int]:
    """Sample and pixel strides of each image; zeros for one that is not there."""
    return [
        s
        for image in images
        for s in ((0, 0) if image is None else (image.stride(0), pixel_stride(image)))
    ]


def _source_strides(
    x: torch.Tensor,
    skip: torch.Tensor | None,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> list[int]:
    return [*_strides(x, skip), 0 if shift is None else shift.stride(0), *_strides(residual)]


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
    B, C1, H, W = x.shape
    C = weight.shape[0]
    sizes, programs, warps = _plan(B, H * W, C, num_groups)
    y = empty(x, (B, H, W, C)).permute(0, 3, 1, 2)
    summed = empty(x, (B, H, W, C1)).permute(0, 3, 1, 2) if return_sum else None
    mean, rstd = (empty(x, (B, num_groups), torch.float32) for _ in range(2))
    counters = torch.zeros(1 + B, dtype=torch.int32, device=x.device)
    slots = [empty(x, (B, num_groups, sizes["P"], sizes["S"]), torch.float32) for _ in range(2)]
    launch(
        group_norm_forward_kernel,
        (programs,),
        x,
        skip,
        shift,
        residual,
        weight,
        bias,
        y,
        summed,
        mean,
        rstd,
        counters,
        *slots,
        B,
        eps,
        *_source_strides(x, skip, shift, residual),
        C1=C1,
        SILU=silu,
        **sizes,
        num_warps=warps,
    )
    handed = x.new_empty(0) if summed is None else rounded(summed, x.dtype)
    return rounded(y, x.dtype), handed, mean, rstd


@group_norm_forward.register_fake
def _(x, weight, bias, shift, residual, skip, num_groups, eps, silu, return_sum):
    B, C1, H, W = x.shape
    y = x.new_empty(B, H, W, weight.shape[0]).permute(0, 3, 1, 2)
    summed = x.new_empty(B, H, W, C1).permute(0, 3, 1, 2) if return_sum else x.new_empty(0)
    mean, rstd = (x.new_empty(B, num_groups, dtype=torch.float32) for _ in range(2))
    return y, summed, mean, rstd


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
    B, C1, H, W = x.shape
    C, N, G = weight.shape[0], H * W, mean.shape[1]
    sizes, programs, warps = _plan(B, N, C, G)
    dx = empty(x, (B, H, W, C1)).permute(0, 3, 1, 2)
    dskip = empty(x, (B, H, W, C - C1)).permute(0, 3, 1, 2)
    counters = torch.zeros(1 + B, dtype=torch.int32, device=x.device)
    group_sums = empty(x, (2, B, G, sizes["P"], sizes["S"]), torch.float32)
    count = (4 if dsummed is not None else 3) if shift_gradient else 2
    channel_sums = empty(x, (B, sizes["P"], count, C), torch.float32)
    dy, dsummed = dense(dy), None if dsummed is None else dense(dsummed)
    launch(
        group_norm_backward_kernel,
        (programs,),
        x,
        skip,
        shift,
        residual,
        weight,
        bias,
        mean,
        rstd,
        dy,
        dsummed,
        dx,
        dskip,
        counters,
        group_sums,
        channel_sums,
        B,
        *_source_strides(x, skip, shift, residual),
        *_strides(dy, dsummed),
        C1=C1,
        SILU=silu,
        SUMS=count,
        **sizes,
        num_warps=warps,
    )
    sums = channel_sums.sum(1)
    dbias, dweight = (sums[:, i].sum(0).to(weight.dtype) for i in range(2))
    dshift = x.new_empty(0)
    if shift_gradient:
        dshift = _shift_gradient(sums, weight, rstd, N)[:, :C1].to(x.dtype).contiguous()
    return rounded(dx, x.dtype), rounded(dskip, x.dtype), dweight, dbias, dshift


def _shift_gradient(
    sums: torch.Tensor, weight: torch.Tensor, rstd: torch.Tensor, N: int
) -> torch.Tensor:
    """Sum over pixels of the gradient of the sum (B, C), from the sums (B, 3 or 4, C) that the
    kernel left.

    The pixels of dx = rstd (w dz - mean(w dz) - v mean(w dz v)) sum to the same expression of sums
    of dz, dz v and v.
    """
    (B, G), C = rstd.shape, weight.shape[0]
    scaled = sums[:, :2] * weight.float()
    means = scaled.view(B, 2, G, -1).sum(-1, keepdim=True) / (N * (C // G))
    plain, product = means.expand(-1, -1, -1, C // G).reshape(B, 2, C).unbind(1)
    shift = (scaled[:, 0] - N * plain - sums[:, 2] * product) * rstd.repeat_interleave(
        C // G, dim=1
    )
    return shift if sums.shape[1] == 3 else shift + sums[:, 3]


@group_norm_backward.register_fake
def _(dy, dsummed, x, weight, bias, shift, residual, skip, mean, rstd, silu, shift_gradient):
    B, C1, H, W = x.shape
    C = weight.shape[0]
    dx, dskip = (x.new_empty(B, H, W, width).permute(0, 3, 1, 2) for width in (C1, C - C1))
    dshift = x.new_empty(B, C1) if shift_gradient else x.new_empty(0)
    return dx, dskip, weight.new_empty(C), weight.new_empty(C), dshift


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight, bias, shift, residual, skip, _, _, silu, return_sum = inputs
    _, summed, mean, rstd = output
    # What was handed on is what was normalised, so that its parts need not be kept.
    kept = (summed, None, None) if return_sum else (x, shift, residual)
    ctx.save_for_backward(*kept, weight, bias, skip, mean, rstd)
    ctx.silu, ctx.has_residual = silu, residual is not None
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, dy: torch.Tensor | None, dsummed: torch.Tensor | None, *_: Any
) -> tuple[Any, ...]:
    x, shift, residual, weight, bias, skip, mean, rstd = ctx.saved_tensors
    if dy is None:
        B, _, H, W = x.shape
        dy = x.new_zeros(B, H, W, weight.shape[0]).permute(0, 3, 1, 2)
    wants_shift = ctx.needs_input_grad[3]
    dx, dskip, dweight, dbias, dshift = group_norm_backward(
        dy, dsummed, x, weight, bias, shift, residual, skip, mean, rstd, ctx.silu, wants_shift
    )
    optional = (
        dshift if wants_shift else None,
        dx if ctx.has_residual else None,
        None if skip is None else dskip,
    )
    return dx, dweight, dbias, *optional, None, None, None, None


group_norm_forward.register_autograd(_backward, setup_context=_save)


def group_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    skip: torch.Tensor | None = None,
    *,
    num_groups: int,
    eps: float,
    silu: bool = False,
    return_sum: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """See `reference.group_norm`; images in channels-last memory, statistics in float32."""
    check(x, weight, bias, shift, residual, skip, num_groups)
    for name, image in {"x": x, "residual": residual, "skip": skip}.items():
        if image is not None:
            order = f"{name} of shape {tuple(image.shape)} with strides {image.stride()}"
            takes = "channels-last memory (x.to(memory_format=torch.channels_last))"
            require(is_channels_last(image), "group_norm", order, takes)
    if shift is not None:
        adjacent = shift.stride(1) == 1 or shift.shape[1] == 1
        require(
            adjacent, "group_norm", f"a shift with strides {shift.stride()}", "channels adjacent"
        )
    y, summed, _, _ = group_norm_forward(
        x, weight, bias, shift, residual, skip, num_groups, eps, silu, return_sum
    )
    return (y, summed) if return_sum else y
