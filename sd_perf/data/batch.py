"""What a loader hands to the training step.

Shape letters: B samples of the micro-batch, H and W latent rows and columns, T text tokens, D context channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch


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
    """(B,) int64: position of each sample in the run, counted over all ranks from its start; keys every random draw"""
    moments: torch.Tensor
    """(B, 8, H, W) float32: mean (4) and log-variance (4) of the autoencoder's posterior, unscaled"""
    captions: list[str]
    """B captions"""
    context: torch.Tensor | None = None
    """(B, T, D) text states, or None where captions are encoded in the step"""
    replacements: list[Replacement] = field(default_factory=list)
    """bad samples replaced in this batch"""

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; copies from pinned memory do not block."""
        if device.type == "cpu":
            return self
        context = None if self.context is None else self.context.to(device, non_blocking=True)
        return Batch(
            self.sample_indices.to(device, non_blocking=True),
            self.moments.to(device, non_blocking=True),
            self.captions,
            context,
            self.replacements,
        )


class Loader(Protocol):
    """A source of micro-batches in the run's order.

    Step s of a run covers the positions [s * G, (s + 1) * G) for global batch G. Rank r of w takes the positions
    congruent to r modulo w, in order, cut into micro-batches.
    """

    num_samples: int
    """samples in one epoch"""
    fingerprint: str
    """identifies the data set: equal for equal shards, whatever folder they lie in"""

    def batches(self, position: int) -> Iterator[Batch]:
        """Micro-batches of this rank without end, from a position that is a multiple of the global batch."""
        ...
