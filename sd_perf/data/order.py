"""Which sample stands at which position of a run.

Position counts samples from the start of the run, over all ranks. Epoch e covers positions [e * n,
(e + 1) * n) and is a permutation that depends on (seed, e, n) alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import count

import numpy as np
import torch

from sd_perf.diffusion.randomness import Stream, philox

_CHUNK = 1 << 16
"""Philox counters per call: bounds the memory of int64 intermediates"""


def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """Permutation (num_samples,) int64 of one epoch: the stable argsort of one 32-bit Philox word
    per sample."""
    counters = -(-num_samples // 4)
    words = np.empty((counters, 4), dtype=np.uint32)
    for start in range(0, counters, _CHUNK):
        stop = min(start + _CHUNK, counters)
        indices = torch.arange(epoch * counters + start, epoch * counters + stop, dtype=torch.int64)
        words[start:stop] = philox(seed, Stream.ORDER, indices, 4).numpy()
    return np.argsort(words.reshape(-1)[:num_samples], kind="stable").astype(np.int64, copy=False)


class SampleOrder:
    """Position -> sample, without end; safe to use from several threads."""

    def __init__(self, seed: int, num_samples: int) -> None:
        self.seed = seed
        self.num_samples = num_samples
        self._lock = threading.Lock()
        self._epochs: dict[int, np.ndarray] = {}

    def sample(self, position: int) -> int:
        """Number of the sample, in [0, num_samples), at a position >= 0."""
        epoch, place = divmod(int(position), self.num_samples)
        return int(self._epoch(epoch)[place])

    def _epoch(self, epoch: int) -> np.ndarray:
        # Batches made ahead may straddle a border, so two epochs are kept (52 MB each for the
        # benchmark's data).
        with self._lock:
            if epoch not in self._epochs:
                if len(self._epochs) == 2:
                    del self._epochs[next(iter(self._epochs))]
                self._epochs[epoch] = epoch_order(self.seed, epoch, self.num_samples)
            return self._epochs[epoch]


def rank_positions(position: int, global_batch: int, rank: int, world_size: int) -> np.ndarray:
    """Positions (global_batch / world_size,) int64 that a rank takes of the step that starts at
    `position`."""
    return np.arange(position + rank, position + global_batch, world_size, dtype=np.int64)


def micro_batches(
    position: int, global_batch: int, micro_batch: int, rank: int, world_size: int
) -> Iterator[np.ndarray]:
    """Positions (micro_batch,) int64 of a rank's micro-batches, without end. ValueError where sizes
    do not divide."""
    if global_batch % (micro_batch * world_size) or not 0 <= rank < world_size:
        raise ValueError(
            f"global batch {global_batch} is not whole micro-batches of {micro_batch} on "
            f"{world_size} ranks"
        )
    if position < 0 or position % global_batch:
        raise ValueError(
            f"position {position} is not a multiple of the global batch {global_batch}"
        )
    return (
        part
        for step in count()
        for part in rank_positions(
            position + step * global_batch, global_batch, rank, world_size
        ).reshape(-1, micro_batch)
    )
