"""The order of samples: which sample stands at which position of a run, and which rank takes it.

A position counts samples from the start of the run, over all ranks. Epoch e of n samples covers the
positions [e * n, (e + 1) * n). It is a permutation that depends on (seed, e, n) alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import count

import numpy as np
import torch

from sd_perf.diffusion.randomness import Stream, philox

_CHUNK = 1 << 16
"""Philox counters per call; bounds the memory of the int64 intermediates"""


def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """Permutation (num_samples,) int64 of one epoch.

    It is the stable argsort of one 32-bit Philox word per sample.
    """
    if num_samples > 1 << 32:
        raise ValueError(f"{num_samples} samples do not fit in 32 bits")
    counters = -(-num_samples // 4)  # a Philox counter gives four words
    words = np.empty((counters, 4), dtype=np.uint64)
    for start in range(0, counters, _CHUNK):
        stop = min(start + _CHUNK, counters)
        indices = torch.arange(epoch * counters + start, epoch * counters + stop, dtype=torch.int64)
        words[start:stop] = philox(seed, Stream.ORDER, indices, 4).numpy()
    # Sorting the words with the samples' numbers in their lower bits is that argsort, and ten
    # times as fast.
    keyed = words.reshape(-1)[:num_samples] << np.uint64(32)
    keyed |= np.arange(num_samples, dtype=np.uint64)
    keyed.sort()
    return (keyed & np.uint64(0xFFFFFFFF)).astype(np.int64)


class SampleOrder:
    """Maps positions of a run to samples, over any number of epochs. Safe to share by threads."""

    def __init__(self, seed: int, num_samples: int) -> None:
        self.seed = seed
        self.num_samples = num_samples
        self._lock = threading.Lock()
        self._epochs: dict[int, np.ndarray] = {}

    def sample(self, position: int) -> int:
        """Number, in [0, num_samples), of the sample at a position >= 0."""
        epoch, place = divmod(int(position), self.num_samples)
        return int(self._epoch(epoch)[place])

    def _epoch(self, epoch: int) -> np.ndarray:
        # Prefetched batches may straddle the end of an epoch, so two epochs are kept (52 MB each
        # for the benchmark's data).
        with self._lock:
            if epoch not in self._epochs:
                if len(self._epochs) == 2:
                    del self._epochs[next(iter(self._epochs))]
                self._epochs[epoch] = epoch_order(self.seed, epoch, self.num_samples)
            return self._epochs[epoch]


def rank_positions(position: int, global_batch: int, rank: int, world_size: int) -> np.ndarray:
    """Positions (global_batch / world_size,) int64 of a rank in the step that starts at `position`.

    Ranks take turns, so the samples of a step are the same for any world size.
    """
    return np.arange(position + rank, position + global_batch, world_size, dtype=np.int64)


def micro_batches(
    position: int, global_batch: int, micro_batch: int, rank: int, world_size: int
) -> Iterator[np.ndarray]:
    """Positions (micro_batch,) int64 of a rank's micro-batches from `position` on, without end.

    Raises ValueError where the global batch is not whole micro-batches on every rank, or the
    position is not a multiple of the global batch.
    """
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
            position + step * global_batch, global_batch, rank=rank, world_size=world_size
        ).reshape(-1, micro_batch)
    )
