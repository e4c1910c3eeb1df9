"""Data without data sets: batches drawn from the seed, and small learnable shards of the project's own making."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from sd_perf.config import DataConfig
from sd_perf.data.batch import Batch
from sd_perf.data.order import micro_batches
from sd_perf.data.portable import pinned
from sd_perf.data.shards import ShardWriter
from sd_perf.diffusion.randomness import Stream, normal

LOG_VARIANCE = -8.0
"""of made moments: a spread of 0.018, small beside the mean's"""
PATTERNS = ((1, 0), (0, 1), (1, 1), (1, -1), (2, 0), (0, 2), (2, 1), (1, 2))
"""waves across the latent's width and height, per pattern"""
BRIGHTNESS = {"bright": 0.5, "dark": -0.5}
"""offset of the latents, in their units, per caption word"""


class SyntheticLoader:
    """Micro-batches of random moments and context, without files; a `Loader`.

    Sample n of `num_samples` is a function of (seed, n); positions go round and round. Latents have unit variance,
    context is standard normal. Samples are kept once drawn, so after one epoch a batch costs a copy.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        in_channels: int = 4,
        context_dim: int = 1024,
        latent_scale: float = 0.18215,
        num_samples: int = 256,
        pin_memory: bool = False,
    ) -> None:
        self.num_samples = num_samples
        self._seed = seed
        self._latent_scale = latent_scale
        self._split = (global_batch_size, micro_batch_size, rank, world_size)
        self._pin_memory = pin_memory
        side = config.latent_size
        self._moments = torch.full((num_samples, 2 * in_channels, side, side), LOG_VARIANCE)
        self._context = torch.empty(num_samples, config.context_tokens, context_dim)
        self._drawn = torch.zeros(num_samples, dtype=torch.bool)
        shapes = f"{tuple(self._moments.shape)} {tuple(self._context.shape)}".replace(" ", "")
        self.fingerprint = f"synthetic:seed={seed}:{shapes}"

    def batches(self, position: int) -> Iterator[Batch]:
        """Micro-batches of this rank without end, from a position that is a multiple of the global batch."""
        return map(self._make, micro_batches(position, *self._split))

    def _draw(self, samples: torch.Tensor) -> None:
        mean, context = self._moments[:, : self._moments.shape[1] // 2], self._context
        split = mean[0].numel()
        numbers = normal(self._seed, Stream.SYNTHETIC, samples, split + context[0].numel())
        mean[samples] = numbers[:, :split].reshape(-1, *mean.shape[1:]) / self._latent_scale
        context[samples] = numbers[:, split:].reshape(-1, *context.shape[1:])
        self._drawn[samples] = True

    def _make(self, positions: np.ndarray) -> Batch:
        indices = torch.from_numpy(positions)
        samples = indices % self.num_samples
        for sample in samples[~self._drawn[samples]].unique().split(8):
            self._draw(sample)
        captions = [f"synthetic sample {sample}" for sample in samples.tolist()]
        batch = Batch(indices, self._moments[samples], captions, self._context[samples])
        return pinned(batch) if self._pin_memory else batch


def caption_context(caption: str, tokens: int, channels: int) -> np.ndarray:
    """Stand-in text states (tokens, channels) float32: a fixed standard normal vector per word, padded or cut.

    A word's vector depends on its letters alone, so prompts given later mean what they meant in training. The padding
    has a vector of its own; an empty caption is all padding.
    """
    words = [zlib.crc32(word.encode()) for word in caption.split()][:tokens]
    words += [zlib.crc32(b"")] * (tokens - len(words))
    return normal(0, Stream.SYNTHETIC, torch.tensor(words), channels).numpy()


def pattern_latents(pattern: int, brightness: str, variation: np.ndarray, channels: int, size: int) -> np.ndarray:
    """Latents (channels, size, size) float32 of about unit variance: one smooth wave, shifted from channel to channel.

    variation (2,): standard normals that move the wave's phase (0.3 radian each) and height (a tenth each).
    """
    across, down = PATTERNS[pattern]
    grid = np.arange(size) / size
    wave = 2 * math.pi * (across * grid[None, :] + down * grid[:, None])
    phase = np.arange(channels)[:, None, None] * math.pi / 2 + 0.3 * variation[0]
    latents = math.sqrt(1.5) * (1 + 0.1 * variation[1]) * np.cos(wave + phase) + BRIGHTNESS[brightness]
    return latents.astype(np.float32)


def write_synthetic_shards(
    folder: str | Path,
    num_samples: int,
    latent_size: int,
    context_tokens: int,
    context_dim: int,
    seed: int,
    *,
    in_channels: int = 4,
    latent_scale: float = 0.18215,
    samples_per_shard: int = 1000,
) -> None:
    """Write shards of eight captioned wave patterns, bright and dark, with text states from `caption_context`.

    Small enough to learn in minutes: every caption names what is seen. DataError where the folder cannot be written.
    """
    names = list(BRIGHTNESS)
    contexts: dict[str, np.ndarray] = {}
    variations = normal(seed, Stream.SYNTHETIC, torch.arange(num_samples), 2).numpy()
    with ShardWriter(folder, samples_per_shard) as writer:
        for sample in range(num_samples):
            pattern, brightness = sample % len(PATTERNS), names[sample // len(PATTERNS) % len(names)]
            caption = f"pattern {pattern} {brightness}"
            if caption not in contexts:
                contexts[caption] = caption_context(caption, context_tokens, context_dim).astype(np.float16)
            latents = pattern_latents(pattern, brightness, variations[sample], in_channels, latent_size)
            mean = latents / latent_scale
            moments = np.concatenate([mean, np.full_like(mean, LOG_VARIANCE)])
            writer.write(moments, caption, {"pattern": pattern, "brightness": brightness}, contexts[caption])
