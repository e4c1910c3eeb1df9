"""The blocks of a UNet, from which every op counts its calls; by default the benchmark's.

Residual blocks on every level, one more on the way up than on the way down; transformers at some
levels and in the middle. The way up reads each level's output beside a skip.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

BATCH = 64
"""samples of the full-size cases; a GPU with 80 GB holds so many"""


@dataclass(frozen=True)
class Architecture:
    """A UNet's sizes; sides and lengths in latent pixels and tokens, the rest in channels."""

    stem: int = 320
    """channels after the first convolution; the time embedding has four times as many"""
    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    """channels of each level"""
    side: int = 64
    """height and width of the latents, halved at each level after the first"""
    transformer_levels: tuple[int, ...] = (0, 1, 2)
    blocks: int = 2
    """residual blocks of a level on the way down"""
    head_dim: int = 64
    context_length: int = 77
    context_width: int = 1024
    in_channels: int = 4
    out_channels: int = 4
    block_groups: int = 16
    transformer_groups: int = 32
    parameters: int = 865_910_724

    @property
    def sides(self) -> tuple[int, ...]:
        """Side of each level."""
        return tuple(self.side >> level for level in range(len(self.widths)))


SD_V2 = Architecture()
"""the benchmark's UNet (Stable Diffusion v2)"""


@dataclass(frozen=True)
class ResBlock:
    """Two 3x3 convolutions with norms, at `side` x `side` pixels."""

    side: int
    sources: tuple[int, ...]
    """channels of its input, and on the way up of the skip that is read beside it"""
    channels: int


@dataclass(frozen=True)
class Transformer:
    """One block of self-attention, cross-attention and feed-forward at `side` x `side` tokens."""

    side: int
    channels: int


@dataclass(frozen=True)
class Resample:
    """A 3x3 convolution that halves a side, or follows a nearest upsampling of it."""

    side: int
    channels: int
    up: bool


def layers(unet: Architecture = SD_V2) -> Iterator[ResBlock | Transformer | Resample]:
    """The UNet's blocks from input to output."""
    widths, sides = unet.widths, unet.sides
    width, skips = unet.stem, [unet.stem]
    for level, (channels, side) in enumerate(zip(widths, sides, strict=True)):
        for _ in range(unet.blocks):
            yield ResBlock(side, (width,), channels)
            width = channels
            if level in unet.transformer_levels:
                yield Transformer(side, channels)
            skips.append(width)
        if level < len(widths) - 1:
            yield Resample(side, channels, up=False)
            skips.append(width)
    yield ResBlock(sides[-1], (width,), width)
    yield Transformer(sides[-1], width)
    yield ResBlock(sides[-1], (width,), width)
    for level in reversed(range(len(widths))):
        channels, side = widths[level], sides[level]
        for _ in range(unet.blocks + 1):
            yield ResBlock(side, (width, skips.pop()), channels)
            width = channels
            if level in unet.transformer_levels:
                yield Transformer(side, channels)
        if level > 0:
            yield Resample(side, channels, up=True)


def transformers(unet: Architecture = SD_V2) -> list[Transformer]:
    """The transformers; the benchmark has sixteen."""
    return [layer for layer in layers(unet) if isinstance(layer, Transformer)]


def res_blocks(unet: Architecture = SD_V2) -> list[ResBlock]:
    """The residual blocks; the benchmark has twenty-two."""
    return [layer for layer in layers(unet) if isinstance(layer, ResBlock)]
