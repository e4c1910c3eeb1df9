"""Data without data sets: batches drawn from the seed.

Shape letters: B samples, C latent channels, S latent rows and columns, L text tokens, D context
channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from sd_perf.config import DataConfig, DiffusionConfig
from sd_perf.data.batch import Batch, LoaderOptions
from sd_perf.diffusion.randomness import Stream, normal

LATENT_SCALE = DiffusionConfig().latent_scale
LOG_VARIANCE = -8.0
"""of the moments: a spread of 0.018, small beside the mean's, as the autoencoder gives real
images"""


def draw_inputs(
    seed: int,
    samples: torch.Tensor,
    latents: tuple[int, int, int],
    context: tuple[int, int],
    latent_scale: float = LATENT_SCALE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Moments (B, 2C, S, S) and context (B, L, D), float32, of samples (B,), for shapes (C, S, S)
    and (L, D).

    Latents have unit variance, context is standard normal; each sample is a function of (seed, its
    number).
    """
    split = math.prod(latents)
    numbers = normal(seed, Stream.SYNTHETIC, samples, split + math.prod(context))
    mean = numbers[:, :split].view(-1, *latents) / latent_scale
    moments = torch.cat([mean, torch.full_like(mean, LOG_VARIANCE)], dim=1)
    return moments, numbers[:, split:].view(-1, *context).contiguous()


class SyntheticLoader:
    """Micro-batches of random moments and context, without files; a `Loader`.

    Sample n of `num_samples` is a function of (seed, n); positions go round and round. Samples are
    kept once drawn, so after one epoch a batch costs a copy.
    """

    def __init__(
        self,
        config: DataConfig,
        options: LoaderOptions,
        latent_scale: float = LATENT_SCALE,
        num_samples: int = 256,
    ) -> None:
        self.num_samples = num_samples
        self._options = options
        self._latent_scale = latent_scale
        side = config.latent_size
        self._moments = torch.empty(num_samples, 2 * options.in_channels, side, side)
        self._context = torch.empty(num_samples, config.context_tokens, options.context_dim)
        self._drawn = torch.zeros(num_samples, dtype=torch.bool)
        shapes = f"{tuple(self._moments.shape)} {tuple(self._context.shape)}".replace(" ", "")
        self.fingerprint = f"synthetic:seed={options.seed}:{shapes}"

    def batches(self, position: int) -> Iterator[Batch]:
        """Micro-batches of this rank without end, from a position that is a multiple of the global
        batch."""
        return map(self._make, self._options.positions(position))

    def _draw(self, samples: torch.Tensor) -> None:
        side, (tokens, channels) = self._moments.shape[-1], self._context.shape[1:]
        latents = (self._options.in_channels, side, side)
        drawn = draw_inputs(
            self._options.seed, samples, latents, (tokens, channels), self._latent_scale
        )
        self._moments[samples], self._context[samples] = drawn
        self._drawn[samples] = True

    def _make(self, positions: np.ndarray) -> Batch:
        indices = torch.from_numpy(positions)
        samples = indices % self.num_samples
        for sample in samples[~self._drawn[samples]].unique().split(8):
            self._draw(sample)
        captions = [f"synthetic sample {sample}" for sample in samples.tolist()]
        batch = Batch(indices, self._moments[samples], captions, self._context[samples])
        return batch.pinned() if self._options.pin_memory else batch
