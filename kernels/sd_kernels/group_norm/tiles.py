"""Tiles of an image, and how the programs of one launch share them out.

An image is cut into tiles of ROWS pixels x BLOCK channels. Each direction of group normalisation
makes two sweeps over the tiles: statistics first, then results. One program does one item: the
statistics of one tile, the result of one tile or, backward, the sums of one block of channels over
all tiles.

Items are handed out by a ticket counter. The order puts the results of a sample LAG samples behind
its statistics. By then the statistics are complete, so that hardly a program waits, and the second
sweep reads the tile from the L2 cache. A program waits only for items with lower tickets; these are
finished or running, so there is no deadlock.

Shape letters: B samples, N pixels, C = C1 + C2 channels (first source, second source), G groups of
CPG channels. Sizes of a launch:

- ITEMS: tiles of a sample, PIXEL_TILES x blocks of channels
- TOUCHED: groups that one block of channels can touch, rounded up to a power of two
- SPAN: blocks of channels that one group can lie in
- SLOTS: PIXEL_TILES x SPAN, the partial sums of one group, rounded up to a power of two
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sd_kernels.group_norm.rows import pixel_stride
from sd_kernels.launch import interpreted


@dataclass(frozen=True)
class Tuning:
    """Launch constants."""

    block: int = 64
    """channels of a tile: all widths of the UNet are multiples, and 8 threads read the 128 bytes of
    a pixel by 16 bytes each"""
    forward_rows: int = 256
    """pixels of a tile: 8 warps hold 64 elements a thread, in at most 128 registers, so that two
    programs fit into a multiprocessor. Sums by channel take a quarter fewer instructions than with
    half as many pixels"""
    backward_rows: int = 128
    """pixels of a tile: with 256 a thread has up to 250 registers, and a program would be alone on
    its multiprocessor: nothing would be read while it computes"""
    warps: int = 8
    """warps of a tile of that many pixels"""
    small_warps: int = 4
    """warps of a smaller tile"""
    samples: int = 32
    """samples whose sums by channel are added at once: 16 numbers for each thread of 4 warps"""
    window: int = 256
    """items between the statistics of a sample and its results: close to 264, the programs of 8
    warps and 128 registers a thread that fit into an H100's 132 multiprocessors, 2 each, at once"""


TUNING = Tuning()


@dataclass(frozen=True)
class Plan:
    """One launch: its compile-time sizes by argument name, its programs, and warps of a program."""

    sizes: dict[str, int]
    programs: int
    num_warps: int


def plan(B: int, N: int, C: int, G: int, max_rows: int, adds_up: bool = False) -> Plan:
    """The launch for images of B samples, N pixels and C channels in G groups.

    With `adds_up` there is an item for every block of channels that adds up sums of the tiles.
    """
    block, per_group = TUNING.block, C // G
    rows = min(max_rows, triton.next_power_of_2(N))
    pixel_tiles = triton.cdiv(N, rows)
    blocks = triton.cdiv(C, block)
    items = pixel_tiles * blocks
    # A group that starts at the last channel of a block reaches over the most blocks, and a block
    # that starts at the last channel of a group touches the most groups.
    span = (per_group + block - 2) // block + 1
    touched = min(G, (block + per_group - 2) // per_group + 1)
    # The interpreter runs one program after the other: any lag is right, the least is quickest.
    lag = 1 if interpreted() else triton.cdiv(TUNING.window, 2 * items)
    sizes = {
        "N": N,
        "C": C,
        "G": G,
        "ITEMS": items,
        "LAG": lag,
        "PIXEL_TILES": pixel_tiles,
        "SPAN": span,
        "SLOTS": triton.next_power_of_2(pixel_tiles * span),
        "TOUCHED": triton.next_power_of_2(touched),
        "ROWS": rows,
        "BLOCK": block,
    }
    num_warps = TUNING.warps if rows == max_rows else TUNING.small_warps
    turn = 2 * items + (blocks if adds_up else 0)
    return Plan(sizes, turn * (B + lag), num_warps)


def strides(*images: torch.Tensor | None) -> list[int]:
    """Elements between samples and between pixels of each image; zeros for an absent one."""
    numbers = []
    for image in images:
        numbers += [0, 0] if image is None else [image.stride(0), pixel_stride(image)]
    return numbers


def source_strides(
    x: torch.Tensor,
    skip: torch.Tensor | None,
    shift: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> list[int]:
    """The strides of what is normalised, in the order of the kernels' arguments."""
    # A shift (C1,) is that of every sample.
    shift_stride = 0 if shift is None or shift.dim() == 1 else shift.stride(0)
    return [*strides(x, skip), shift_stride, *strides(residual)]


@triton.jit
def take_item(counters, B, ITEMS: tl.constexpr, SUMMING: tl.constexpr, LAG: tl.constexpr):
    """Draws a ticket: (sample, number of the item in its turn, does it exist, launches before).

    A turn has ITEMS statistics, ITEMS results and SUMMING items that add up. Counters are never
    cleared, see `launch.counters`: launches before this one drew from them, each as many tickets.
    """
    # Relaxed: a ticket says nothing of memory. Its number is unique and tickets are drawn in their
    # order whatever the ordering, and `arrive` and `wait` order the accesses of data.
    drawn = tl.atomic_add(counters, 1, sem="relaxed")
    programs = (2 * ITEMS + SUMMING) * (B + LAG)
    launches = drawn // programs
    ticket = (drawn - launches * programs).to(tl.int32)
    # Turn t has the statistics of sample t, then the results of sample t - LAG. The first LAG turns
    # have no results and the last LAG turns no statistics.
    turn, item = ticket // (2 * ITEMS + SUMMING), ticket % (2 * ITEMS + SUMMING)
    sample = turn - tl.where(item >= ITEMS, LAG, 0)
    return sample, item, (sample >= 0) & (sample < B), launches


@triton.jit
def arrive(counters, sample):
    """Counts one tile of the sample as finished."""
    # One thread does the atomic. The barrier puts the stores of all threads before it, and the
    # release makes them visible with it (PTX ISA, Memory Consistency Model, causality order).
    tl.debug_barrier()
    tl.atomic_add(counters + 1 + sample, 1, sem="acq_rel")  # narrow: a counter


@triton.jit
def wait(counters, sample, launches, ITEMS: tl.constexpr):
    """Returns when all tiles of the sample are finished."""
    # Adding zero reads the counter in the L2 cache with acquire order; a plain load would be lifted
    # out of the loop.
    finished = (launches + 1) * ITEMS
    while tl.atomic_add(counters + 1 + sample, 0, sem="acquire") < finished:  # narrow: a counter
        pass


@triton.jit
def groups_of(
    block, CPG: tl.constexpr, C: tl.constexpr, TOUCHED: tl.constexpr, BLOCK: tl.constexpr
):
    """The first group that a block touches, and each channel's membership (BLOCK, TOUCHED)."""
    channels = block * BLOCK + tl.arange(0, BLOCK)
    first = block * BLOCK // CPG
    is_member = (channels // CPG - first)[:, None] == tl.arange(0, TOUCHED)[None, :]
    return first, is_member & (channels < C)[:, None]


@triton.jit
def to_groups(values, member):
    """Sums of values (BLOCK,) by group (TOUCHED,)."""
    return tl.sum(tl.where(member, values[:, None], 0.0), axis=0)


@triton.jit
def to_channels(values, member):
    """Values of groups (TOUCHED,) at each of their channels, as a row (1, BLOCK)."""
    # At most one term of each sum is not zero, so that this is exact.
    return tl.sum(tl.where(member, values[None, :], 0.0), axis=1)[None, :]


@triton.jit
def slots_of_tile(
    sample,
    tile,
    block,
    first,
    G: tl.constexpr,
    CPG: tl.constexpr,
    PIXEL_TILES: tl.constexpr,
    SPAN: tl.constexpr,
    TOUCHED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Where a tile stores its part of each group (TOUCHED,), and which of these groups exist.

    Partial sums are kept in arrays (B, G, PIXEL_TILES, SPAN): no two tiles share a slot.
    """
    groups = first + tl.arange(0, TOUCHED)
    place = ((sample * G + groups) * PIXEL_TILES + tile) * SPAN + block - groups * CPG // BLOCK
    return place, (groups < G) & (groups * CPG < (block + 1) * BLOCK)


@triton.jit
def slots_of_groups(
    sample,
    first,
    N: tl.constexpr,
    G: tl.constexpr,
    CPG: tl.constexpr,
    PIXEL_TILES: tl.constexpr,
    SPAN: tl.constexpr,
    SLOTS: tl.constexpr,
    TOUCHED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """All parts of TOUCHED groups (TOUCHED, SLOTS): place, elements of each, whether it exists."""
    groups = (first + tl.arange(0, TOUCHED))[:, None]
    index = tl.arange(0, SLOTS)[None, :]
    block = groups * CPG // BLOCK + index % SPAN
    # Channels that block and group share, times pixels that the tile has inside the image.
    channels = tl.minimum((block + 1) * BLOCK, (groups + 1) * CPG) - tl.maximum(
        block * BLOCK, groups * CPG
    )
    pixels = tl.minimum(N - index // SPAN * ROWS, ROWS)
    exists = (groups < G) & (index < PIXEL_TILES * SPAN) & (channels > 0)
    place = (sample * G + groups) * PIXEL_TILES * SPAN + index
    return place, (channels * pixels).to(tl.float32), exists


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) in float32."""
    # The divisor is at least 1 and may be infinite: the square of its reciprocal root, one
    # instruction, needs none of the cases of a division. Its relative error is 2^-22.
    root = tl.rsqrt(1.0 + tl.exp(-x))
    return root * root


@triton.jit
def load_parts(place, exists):
    """Partial sums that other programs of this launch stored."""
    # .cg reads from the L2 cache: first-level caches are not coherent within a launch (PTX ISA,
    # Cache Operators).
    return tl.load(place, mask=exists, other=0.0, cache_modifier=".cg")  # narrow: few numbers


@triton.jit
def load_by_channel(pointer, channels, C: tl.constexpr):
    """One number a channel (BLOCK,) in float32."""
    return tl.load(pointer + channels, mask=channels < C, other=0.0).to(tl.float32)  # narrow: 64


@triton.jit
def load_raw(image, stride, pixel, at, inside, other, CACHE: tl.constexpr):
    """A tile (ROWS, BLOCK) as it is in memory, `other` outside; strides of samples and of pixels.

    CACHE is ".cg" where another program of this launch wrote the image; see `load_parts`.
    """
    sample, rows, channels = at
    # A batch may have more than 2^31 elements, a sample has fewer.
    place = image + sample.to(tl.int64) * stride + rows[:, None] * pixel + channels[None, :]
    return tl.load(place, mask=inside, other=other, cache_modifier=CACHE)


@triton.jit
def load_pixels(image, stride, pixel, at, inside):
    """A tile (ROWS, BLOCK) in float32, zero outside; strides of samples and of pixels."""
    return load_raw(image, stride, pixel, at, inside, 0.0, "").to(tl.float32)


@triton.jit
def load_sources(x, skip, layout, at, inside, C1: tl.constexpr, CACHE: tl.constexpr):
    """The tile (ROWS, BLOCK) of x, and of skip from channel C1 on, as they are in memory.

    `layout` has the strides in the order of `source_strides`, `at` is (sample, rows, channels).
    """
    sample, rows, channels = at
    # One block may hold the last channels of x and the first of skip: each source has its mask.
    first = inside & (channels < C1)[None, :]
    raw = load_raw(x, layout[0], layout[1], at, first, 0.0, CACHE)
    if skip is not None:
        # Loaded over the zeros that x has there, which costs no addition.
        second, at = inside & (channels >= C1)[None, :], (sample, rows, channels - C1)
        raw = load_raw(skip, layout[2], layout[3], at, second, raw, "")
    return raw


@triton.jit
def sum_of(raw, shift, residual, layout, at, inside, C1: tl.constexpr):
    """What is normalised, in float32: a tile of `load_sources`, and shift and residual of x."""
    sample, _, channels = at
    value = raw.to(tl.float32)
    first = inside & (channels < C1)[None, :]
    if shift is not None:
        added = load_by_channel(shift + sample.to(tl.int64) * layout[4], channels, C1)
        value += tl.where(first, added[None, :], 0.0)
    if residual is not None:
        value += load_pixels(residual, layout[5], layout[6], at, first)
    return value


@triton.jit
def store_pixels(image, value, at, width: tl.constexpr, N: tl.constexpr, inside):
    """Writes a tile (ROWS, BLOCK) into a dense image (B, N, width)."""
    sample, rows, channels = at
    start = image + sample.to(tl.int64) * N * width
    tl.store(start + rows[:, None] * width + channels[None, :], value, mask=inside)
