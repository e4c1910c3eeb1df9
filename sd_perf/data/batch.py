"""What a loader hands to the training step.

Shape letters: B samples of the micro-batch, H and W latent rows and columns, T text tokens, D
context channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from sd_perf.data.order import micro_batches


@dataclass(frozen=True)
class Replacement:
    """A bad sample that a batch does without."""

    sample_index: int
    """position in the run whose sample was bad"""
    key: str
    """key of the bad sample, with its shard"""
    reason: str
    """what is wrong with it, one sentence"""


@dataclass
class Batch:
    """One micro-batch of one rank."""

    sample_indices: torch.Tensor
    """(B,) int64: position of each sample in the run, counted over all ranks from its start; keys
    every random draw"""
    moments: torch.Tensor
    """(B, 8, H, W) float32: mean (4) and log-variance (4) of the autoencoder's posterior,
    unscaled"""
    captions: list[str]
    """B captions"""
    context: torch.Tensor | None = None
    """(B, T, D) text states, or None where captions are encoded in the step"""
    replacements: list[Replacement] = field(default_factory=list)
    """bad samples replaced in this batch"""

    def pinned(self) -> Batch:
        """The same batch in page-locked memory."""
        return self._map(torch.Tensor.pin_memory)

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; copies from pinned memory do not block."""
        return (
            self
            if device.type == "cpu"
            else self._map(lambda tensor: tensor.to(device, non_blocking=True))
        )

    def _map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        context = None if self.context is None else change(self.context)
        return Batch(
            change(self.sample_indices),
            change(self.moments),
            self.captions,
            context,
            self.replacements,
        )


@dataclass(frozen=True)
class LoaderOptions:
    """What every loader is told: which part of which batches it makes, in what sizes and order."""

    seed: int
    """of the order, or of the samples themselves"""
    global_batch_size: int
    """samples per step, over all ranks"""
    micro_batch_size: int
    """samples per batch"""
    rank: int = 0
    world_size: int = 1
    in_channels: int = 4
    """channels of the latents"""
    context_dim: int = 1024
    """channels of the text states"""
    pin_memory: bool = False
    """batches in page-locked memory, which copies to a GPU without blocking"""

    def positions(self, start: int) -> Iterator[np.ndarray]:
        """Positions (micro_batch_size,) of each micro-batch of this rank, without end."""
        return micro_batches(
            start, self.global_batch_size, self.micro_batch_size, self.rank, self.world_size
        )


class Loader(Protocol):
    """A source of micro-batches in the run's order.

    Step s of a run covers the positions [s * G, (s + 1) * G) for global batch G. Rank r of w takes
    the positions congruent to r modulo w, in order, cut into micro-batches.
    """

    num_samples: int
    """samples in one epoch"""
    fingerprint: str
    """identifies the data set: equal for equal shards, whatever folder they lie in"""

    def batches(self, position: int) -> Iterator[Batch]:
        """Micro-batches of this rank without end, from a position that is a multiple of the global
        batch."""
        ...
