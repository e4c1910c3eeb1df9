"""How many samples a config's loader gives, what they cost, and whether its step would wait."""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from sd_perf.config import Config
from sd_perf.data.formats import FORMATS
from sd_perf.data.loaders.build_loader import loader_of
from sd_perf.data.loaders.portable import PortableLoader
from sd_perf.data.order import SampleOrder
from sd_perf.data.resize import resize_and_crop
from sd_perf.data.usage import remedy, usable_cores
from sd_perf.errors import DataError
from sd_perf.models.vae import PIXELS_PER_LATENT
from sd_perf.optional import optional

_SEED = 0
_PROBED = 64
"""samples whose cost is taken apart"""


@dataclass(frozen=True)
class LoaderRate:
    """What one process's loader gave while nothing else asked for time."""

    samples_per_second: float
    bytes_per_sample: float
    """read from the shards, on average"""
    cpu_ms: dict[str, float]
    """milliseconds per sample by stage, in one thread, from the page cache"""
    advice: str
    """what would raise the rate, by `sd_perf.data.usage.remedy`"""

    def lines(self, needed: float | None, who: str) -> Iterator[str]:
        """The figures in words; the step of `who` takes `needed` samples per second."""
        rate, total = self.samples_per_second, sum(self.cpu_ms.values())
        megabytes = rate * self.bytes_per_sample / 1e6
        stages = ", ".join(f"{stage} {cost:.3f}" for stage, cost in self.cpu_ms.items())
        yield f"{rate:,.0f} samples/s, {megabytes:,.0f} MB/s from one process"
        yield f"CPU ms per sample: {total:.3f} ({stages}); a core makes {1e3 / total:,.0f} a second"
        if needed is None:
            yield "whether a step would wait: name a GPU (--gpu) or a rate (--step-rate)"
        elif rate >= needed:
            yield f"no step would wait: {who} takes {needed:,.0f} samples/s of each process"
        else:
            short = 1 - rate / needed
            yield (
                f"the step would wait {short:.0%} of the time: {who} takes {needed:,.0f} samples/s "
                f"of each process; the loader's {self.advice}"
            )


def measure(config: Config, ranks: int, seconds: float) -> LoaderRate:
    """Read batches as one of `ranks` processes would, for so many seconds.

    DataError for synthetic data, and for shards that cannot be used.
    """
    loader = loader_of(config, seed=_SEED, rank=0, world_size=ranks)
    if not isinstance(loader, PortableLoader):
        raise DataError("data.format synthetic reads no files: there is nothing to measure")
    batches = loader.batches(0)
    size = len(next(batches).captions)  # threads are up, files are open
    used, start, count, passed = loader.usage, time.monotonic(), 0, 0.0
    while passed < seconds:
        next(batches)
        count += size
        passed = time.monotonic() - start
    spent = loader.usage - used
    batches.close()
    probed = np.arange(min(_PROBED, loader.num_samples, size))  # a batch at most
    order = SampleOrder(_SEED, loader.num_samples)
    places = [_places(loader, config, order.sample(int(position))) for position in probed]
    return LoaderRate(
        count / passed,
        sum(size for parts in places for _, size, _ in parts) / len(places),
        _stages(loader, config, places),
        remedy(config.data, spent, passed, usable_cores()),
    )


def _places(loader: PortableLoader, config: Config, number: int) -> list[tuple[int, int, int]]:
    """Descriptor, bytes and offset of each part of a sample that the config reads."""
    index, row = loader.index, loader.index.samples[number]
    parts = [part for part in FORMATS[index.format].parts if part != "context"]
    if config.data.context == "precomputed":
        parts.append("context")
    descriptor = loader.descriptors[row["shard"]]
    return [(descriptor, int(row[f"{part}_size"]), int(row[f"{part}_offset"])) for part in parts]


def _stages(
    loader: PortableLoader, config: Config, places: list[list[tuple[int, int, int]]]
) -> dict[str, float]:
    """CPU milliseconds per sample by stage; those at the first positions stand for all."""
    positions = np.arange(len(places))

    def read() -> list[bytes]:
        return [os.pread(*place) for parts in places for place in parts]

    read()  # into the page cache
    reading, all_of_it = _cpu(read), _cpu(lambda: loader.make(positions))
    is_raw = config.data.format == "raw"
    rest = "decode and resize" if is_raw else "check and convert"
    costs = {"read": reading, rest: all_of_it - reading}
    if is_raw and config.data.loader == "portable":
        Image = optional("PIL.Image", "images need Pillow", "images")
        sizes = [Image.open(io.BytesIO(os.pread(*parts[0]))).size for parts in places]
        blank = [np.zeros((height, width, 3), np.uint8) for width, height in sizes]
        size = PIXELS_PER_LATENT * config.data.latent_size
        resizing = _cpu(lambda: [resize_and_crop(picture, size) for picture in blank])
        costs = {"read": reading, "resize": resizing, "decode": all_of_it - reading - resizing}
    return {stage: max(1e3 * cost, 0) / len(places) for stage, cost in costs.items()}


def _cpu(work: Callable[[], object]) -> float:
    """Least CPU seconds of this process that a call took, of three."""
    times = []
    for _ in range(3):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)
