"""The loader that runs everywhere: threads that read and decode whole micro-batches ahead of the step."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch

from sd_perf.config import DataConfig
from sd_perf.data.batch import Batch, Replacement
from sd_perf.data.order import SampleOrder, micro_batches
from sd_perf.data.samples import Sample, SampleReader
from sd_perf.data.shards import ShardIndex
from sd_perf.errors import BadSampleError, DataError


class PortableLoader:
    """Micro-batches of moments shards; a `Loader`.

    Context comes as float32 whatever the shards hold. Raises DataError for shards that cannot be used, and
    BadSampleError for a bad sample where data.max_bad_samples is 0; otherwise bad samples are replaced and told in
    `Batch.replacements`, and the caller, who alone sees all ranks, holds their number against the limit.
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
        pin_memory: bool = False,
    ) -> None:
        self._config = config
        self._index = ShardIndex.open(config.path, config.index, need_context=config.context == "precomputed")
        self._reader = SampleReader(self._index, config, in_channels, context_dim)
        self.num_samples = len(self._index)
        self.fingerprint = self._index.fingerprint
        self._order = SampleOrder(seed, self.num_samples)
        self._split = (global_batch_size, micro_batch_size, rank, world_size)
        self._moments_shape = (2 * in_channels, config.latent_size, config.latent_size)
        self._context_shape = (config.context_tokens, context_dim)
        self._pin_memory = pin_memory

    def batches(self, position: int) -> Iterator[Batch]:
        """Micro-batches of this rank without end, from a position that is a multiple of the global batch."""
        work = micro_batches(position, *self._split)
        return _made_ahead(self._make, work, self._config.workers, self._config.prefetch_batches)

    def _make(self, positions: np.ndarray) -> Batch:
        size = len(positions)
        context = torch.empty(size, *self._context_shape) if self._config.context == "precomputed" else None
        batch = Batch(torch.from_numpy(positions), torch.empty(size, *self._moments_shape), [], context)
        for row, position in enumerate(positions.tolist()):
            sample, replacement = self._good_sample(position)
            batch.moments.numpy()[row] = sample.moments
            batch.captions.append(sample.caption)
            if context is not None:
                context.numpy()[row] = sample.context
            if replacement is not None:
                batch.replacements.append(replacement)
        return pinned(batch) if self._pin_memory else batch

    def _good_sample(self, position: int) -> tuple[Sample, Replacement | None]:
        """The sample of a position, or the next good one of the order with the record of what it replaces."""
        replacement = None
        for candidate in range(position, position + self.num_samples):
            number = self._order.sample(candidate)
            try:
                return self._reader.read(number), replacement
            except BadSampleError as error:
                culprit = f"{self._index.folder}: sample {self._index.name(number)}: {error}"
                if self._config.max_bad_samples == 0:
                    raise BadSampleError(f"{culprit}; mend it, or set data.max_bad_samples above 0") from error
                replacement = replacement or Replacement(position, self._index.name(number), str(error))
        raise DataError(f"{self.num_samples} samples in a row are bad; the last is {culprit}")


def pinned(batch: Batch) -> Batch:
    """The same batch in page-locked memory, which copies to a GPU without blocking."""
    context = None if batch.context is None else batch.context.pin_memory()
    tensors = (batch.sample_indices.pin_memory(), batch.moments.pin_memory())
    return Batch(*tensors, batch.captions, context, batch.replacements)


def _made_ahead(
    make: Callable[[np.ndarray], Batch], work: Iterator[np.ndarray], workers: int, ahead: int
) -> Iterator[Batch]:
    """make(item) of each work item, in order, with `ahead` of them under way; closing it ends the threads."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="sd_perf_data")
    try:
        pending = deque(pool.submit(make, item) for item in islice(work, ahead))
        for item in work:
            batch = pending.popleft().result()
            pending.append(pool.submit(make, item))
            yield batch
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
