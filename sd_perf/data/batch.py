"""The interface between loaders and the training step: `Batch`, `LoaderOptions`, `Loader`.

Shape letters: B samples of the micro-batch, C latent channels, S latent rows and columns, P rows
and columns of a picture, T text tokens, D context channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from sd_perf.config import DataConfig
from sd_perf.data.order import micro_batches
from sd_perf.data.usage import Usage
from sd_perf.models.vae import PIXELS_PER_LATENT

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Replacement:
    """A bad sample that was replaced by the next good one."""

    sample_index: int
    """position in the run at which the bad sample stands"""
    key: str
    """key and shard of the bad sample"""
    reason: str
    """what is wrong with it, one sentence"""


@dataclass
class Batch:
    """One micro-batch of one rank."""

    sample_indices: torch.Tensor
    """(B,) int64: position of each sample in the run, counted over all ranks; keys every random
    draw of the sample"""
    moments: torch.Tensor | None
    """(B, 2C, S, S) float32, or float16 as encoded shards store them: mean, then log-variance, of
    the autoencoder's posterior, unscaled; None where the training step encodes the pictures"""
    captions: list[str]
    """B captions"""
    context: torch.Tensor | None = None
    """(B, T, D) text states, float32, or float16 as encoded shards store them; None where the
    training step encodes the captions"""
    replacements: list[Replacement] = field(default_factory=list)
    """bad samples replaced in this batch"""
    pixels: torch.Tensor | None = None
    """(B, 3, P, P) float32, in the range that the autoencoder's encoder gets; None where there are
    moments"""

    @classmethod
    def empty(cls, positions: np.ndarray, config: DataConfig, options: LoaderOptions) -> Batch:
        """A batch for the samples at these positions (B,) int64, to be filled.

        It has the tensors that the config's format gives, of the dtypes that it gives them in,
        in page-locked memory where the options say so.
        """
        # torch keeps page-locked memory once it is freed, so that no batch waits for an allocation.
        empty = functools.partial(torch.empty, pin_memory=options.pin_memory)
        indices = torch.from_numpy(positions)
        size, side, is_raw = len(positions), config.latent_size, config.format == "raw"
        dtype = torch.float16 if config.format == "encoded" else torch.float32
        pixels = PIXELS_PER_LATENT * side
        text = config.context_tokens, options.context_dim
        has_context = config.context == "precomputed"
        return cls(
            indices.pin_memory() if options.pin_memory else indices,
            None if is_raw else empty(size, 2 * options.in_channels, side, side, dtype=dtype),
            captions=[],
            context=empty(size, *text, dtype=dtype) if has_context else None,
            pixels=empty(size, 3, pixels, pixels) if is_raw else None,
        )

    def pinned(self) -> Batch:
        """The same batch in page-locked memory."""
        return self._map(torch.Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device. Copies from pinned memory do not block."""
        if device.type == "cpu":
            return self
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        moments, context, pixels = (
            None if tensor is None else change(tensor)
            for tensor in (self.moments, self.context, self.pixels)
        )
        indices = change(self.sample_indices)
        return Batch(indices, moments, self.captions, context, self.replacements, pixels)


@dataclass(frozen=True)
class LoaderOptions:
    """Options common to all loaders: seed, batch sizes, this rank's share, tensor sizes."""

    seed: int
    """seed of the sample order, or of the samples themselves where they are synthetic"""
    global_batch_size: int
    """samples per optimizer step, over all ranks"""
    micro_batch_size: int
    """samples per `Batch`"""
    rank: int = 0
    world_size: int = 1
    in_channels: int = 4
    """channels of the latents"""
    context_dim: int = 1024
    """channels of the text states"""
    device: torch.device = _CPU
    """on which the step takes the batches"""

    @property
    def pin_memory(self) -> bool:
        """Whether batches are in page-locked memory, from which copies to a GPU do not block."""
        return self.device.type == "cuda"

    def positions(self, start: int) -> Iterator[np.ndarray]:
        """Positions (micro_batch_size,) int64 of each micro-batch of this rank, without end."""
        return micro_batches(
            position=start,
            global_batch=self.global_batch_size,
            micro_batch=self.micro_batch_size,
            rank=self.rank,
            world_size=self.world_size,
        )


class Loader(Protocol):
    """A source of micro-batches in the order of the run.

    Step s of a run covers the positions [s * G, (s + 1) * G) for global batch G. Rank r of w takes
    the positions congruent to r modulo w, in order, cut into micro-batches.
    """

    num_samples: int
    """samples in one epoch"""
    fingerprint: str
    """identifies the data set: equal for equal shards, whatever folder they lie in"""
    keys_fingerprint: str
    """identifies its samples and their order: equal for the same ones in another format"""

    @property
    def usage(self) -> Usage:
        """What its threads have spent so far; nothing where it has none."""
        ...

    def batches(self, position: int) -> Iterator[Batch]:
        """Micro-batches of this rank from a position on, without end.

        `position` is a multiple of the global batch.
        """
        ...

    def require_unchanged(self) -> None:
        """DataError where the data were written to since this loader was made.

        Called before each checkpoint, so that none holds weights of mixed data unnoticed.
        """
        ...
