"""The loader that runs everywhere: threads read and decode micro-batches ahead of the step."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable

import numpy as np

from sd_perf.config import DataConfig
from sd_perf.data.augmentation import draw_views
from sd_perf.data.batch import Batch, LoaderOptions, Replacement
from sd_perf.data.loaders.quick_rows import QuickRows
from sd_perf.data.order import SampleOrder
from sd_perf.data.resize import View
from sd_perf.data.samples import Sample, SampleReader
from sd_perf.data.shards import ShardIndex
from sd_perf.data.threads import map_ahead
from sd_perf.data.usage import Stopwatch, Usage
from sd_perf.errors import BadSampleError, DataError

_READ_AHEAD = 2**20
"""bytes of a part that are asked for ahead, at most"""


class PortableLoader:
    """Reads micro-batches from shards of any format; a `Loader`.

    Batches have the dtypes of `Batch.empty`, whatever a moments shard stores its context in. Raises
    DataError for shards that cannot be used.

    A bad sample raises BadSampleError where data.max_bad_samples is 0. Otherwise it is replaced by
    the next good one and listed in `Batch.replacements`. The trainer checks the number of
    replacements against the limit, because a loader sees the samples of its own rank only.
    """

    def __init__(self, config: DataConfig, options: LoaderOptions) -> None:
        self._config = config
        self._options = options
        self._index = ShardIndex.open(
            config.path,
            config.index,
            format=config.format,
            need_context=config.context == "precomputed",
        )
        self._reader = SampleReader(
            self._index, config, in_channels=options.in_channels, context_dim=options.context_dim
        )
        self._quick: QuickRows | None = None
        if config.format != "raw":
            self._quick = QuickRows(self._index, self._reader.descriptors, config)
        self._stopwatch = Stopwatch()
        self.num_samples = len(self._index)
        self.fingerprint = self._index.fingerprint
        self.keys_fingerprint = self._index.keys_fingerprint
        self._order = SampleOrder(options.seed, self.num_samples)

    def batches(self, position: int) -> Generator[Batch, None, None]:
        """Micro-batches of this rank from a position on, without end; see `Loader`."""
        positions = self._options.positions(position)
        return map_ahead(
            self._timed_make, positions, self._config.workers, self._config.prefetch_batches
        )

    @property
    def index(self) -> ShardIndex:
        """Where the samples lie."""
        return self._index

    @property
    def descriptors(self) -> list[int]:
        """One of each shard of the index, open as long as this object lives."""
        return self._reader.descriptors

    def require_unchanged(self) -> None:
        """DataError where a shard was written to since it was opened; see `Loader`."""
        self._reader.require_unchanged()

    @property
    def usage(self) -> Usage:
        """What the threads have spent so far; see `Loader`."""
        return self._stopwatch.usage

    def _timed_make(self, positions: np.ndarray) -> Batch:
        with self._stopwatch.batch():
            return self.make(positions)

    def make(self, positions: np.ndarray) -> Batch:
        """The micro-batch of the samples at these positions, made in the thread that asks."""
        batch = Batch.empty(positions, self._config, self._options)
        parts = {"moments": batch.moments, "picture": batch.pixels, "context": batch.context}
        arrays = {part: tensor.numpy() for part, tensor in parts.items() if tensor is not None}
        self._announce(positions, arrays)
        views = self._views(positions)
        for row, position in enumerate(positions.tolist()):
            rows = {part: array[row] for part, array in arrays.items()}
            self._fill(batch, position, views[row], rows)
        return batch

    def _views(self, positions: np.ndarray) -> list[View]:
        flip, crop = self._config.random_flip, self._config.random_crop
        return draw_views(self._options.seed, positions, flip=flip, crop=crop)

    def _announce(self, positions: np.ndarray, parts: Iterable[str]) -> None:
        """Have the system read these parts of samples at once; what asks for each then finds it."""
        if not hasattr(os, "posix_fadvise"):
            return
        for position in positions.tolist():
            row = self._index.samples[self._order.sample(position)]
            for part in parts:
                place = int(row[f"{part}_offset"]), min(int(row[f"{part}_size"]), _READ_AHEAD)
                os.posix_fadvise(self.descriptors[row["shard"]], *place, os.POSIX_FADV_WILLNEED)

    def _fill(self, batch: Batch, position: int, view: View, parts: dict[str, np.ndarray]) -> None:
        """Fill the row of a batch that these arrays are with the sample at a position."""
        number = self._order.sample(position)
        caption = self._quick.read(number, parts) if self._quick else None
        if caption is None:
            sample, replacement = self._good_sample(position, view)
            caption = sample.caption
            for part, array in parts.items():
                array[:] = sample.pixels if part == "picture" else getattr(sample, part)
            if replacement is not None:
                batch.replacements.append(replacement)
        batch.captions.append(caption)

    def _good_sample(self, position: int, view: View) -> tuple[Sample, Replacement | None]:
        """The sample at a position, or the next good one of the order, with its `Replacement`.

        It is seen in the view that was drawn for the position.
        """
        replacement = None
        for candidate in range(position, position + self.num_samples):
            number = self._order.sample(candidate)
            try:
                return self._reader.read(number, view), replacement
            except BadSampleError as error:
                culprit = f"{self._index.folder}: sample {self._index.name(number)}: {error}"
                if self._config.max_bad_samples == 0:
                    raise BadSampleError(
                        f"{culprit}; mend it, or set data.max_bad_samples above 0"
                    ) from error
                replacement = replacement or Replacement(
                    position, self._index.name(number), str(error)
                )
        raise DataError(f"{self.num_samples} samples in a row are bad; the last is {culprit}")
