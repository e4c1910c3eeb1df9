"""Synthetic data: batches drawn from the seed, without files.

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
from sd_perf.data.usage import Usage
from sd_perf.diffusion.randomness import Stream, normal

LATENT_SCALE = DiffusionConfig().latent_scale
LOG_VARIANCE = -8.0
"""log-variance of every synthetic moment: a standard deviation of 0.018, small beside that of the
means, as the autoencoder gives for real images"""


def draw_inputs(
    seed: int,
    samples: torch.Tensor,
    latents: tuple[int, int, int],
    context: tuple[int, int],
    latent_scale: float = LATENT_SCALE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw moments (B, 2C, S, S) and context (B, L, D), float32, of the samples numbered (B,).

    `latents` is (C, S, S), `context` (L, D). Scaled latents have unit variance, context is standard
    normal. Each sample is a function of (seed, its number).
    """
    split = math.prod(latents)
    numbers = normal(seed, Stream.SYNTHETIC, samples, split + math.prod(context))
    mean = numbers[:, :split].view(-1, *latents) / latent_scale
    moments = torch.cat([mean, torch.full_like(mean, LOG_VARIANCE)], dim=1)
    return moments, numbers[:, split:].view(-1, *context).contiguous()


class SyntheticLoader:
    """Micro-batches of random moments and context; a `Loader`.

    Sample n of `num_samples` is a function of (seed, n), and position p holds sample p modulo
    num_samples. Samples are kept once drawn, so from the second epoch on a batch costs a copy.
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
        self.fingerprint = self.keys_fingerprint = f"synthetic:seed={options.seed}:{shapes}"

    @property
    def usage(self) -> Usage:
        """Nothing: batches are made when they are asked for; see `Loader`."""
        return Usage()

    def batches(self, position: int) -> Iterator[Batch]:
        """Micro-batches of this rank from a position on, without end; see `Loader`."""
        return map(self._make, self._options.positions(position))

    def require_unchanged(self) -> None:
        """Nothing can change; see `Loader`."""

    def _draw(self, samples: torch.Tensor) -> None:
        side, (tokens, channels) = self._moments.shape[-1], self._context.shape[1:]
        self._moments[samples], self._context[samples] = draw_inputs(
            self._options.seed,
            samples,
            latents=(self._options.in_channels, side, side),
            context=(tokens, channels),
            latent_scale=self._latent_scale,
        )
        self._drawn[samples] = True

    def _make(self, positions: np.ndarray) -> Batch:
        indices = torch.from_numpy(positions)
        samples = indices % self.num_samples
        # Eight at a time: normal() holds several int64 and float64 copies of what it draws.
        for missing in samples[~self._drawn[samples]].unique().split(8):
            self._draw(missing)
        captions = [f"synthetic sample {sample}" for sample in samples.tolist()]
        batch = Batch(indices, self._moments[samples], captions, self._context[samples])
        return batch.pinned() if self._options.pin_memory else batch
