"""What a loader's threads spend, and what would help where the step waits for them."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sd_perf.config import DataConfig


@dataclass(frozen=True)
class Usage:
    """Sums over the micro-batches that were made."""

    batches: int = 0
    seconds: float = 0.0
    """in which a thread made one"""
    cpu_seconds: float = 0.0
    """of those threads"""

    def __sub__(self, earlier: Usage) -> Usage:
        return Usage(
            self.batches - earlier.batches,
            self.seconds - earlier.seconds,
            self.cpu_seconds - earlier.cpu_seconds,
        )


class Stopwatch:
    """Adds up the usage of threads; they share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.usage = Usage()

    @contextmanager
    def batch(self) -> Iterator[None]:
        """Count the block, in which this thread makes a micro-batch."""
        start, cpu_start = time.monotonic(), time.thread_time()
        yield
        self._add(1, time.monotonic() - start, time.thread_time() - cpu_start)

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """Count a part of it, in which another thread computes for this one."""
        start, cpu_start = time.monotonic(), time.thread_time()
        yield
        self._add(0, 0.0, time.monotonic() - start - (time.thread_time() - cpu_start))

    def _add(self, batches: int, seconds: float, cpu_seconds: float) -> None:
        with self._lock:
            so_far = self.usage
            self.usage = Usage(
                so_far.batches + batches,
                so_far.seconds + seconds,
                so_far.cpu_seconds + cpu_seconds,
            )


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def remedy(config: DataConfig, usage: Usage, seconds: float, cores: int) -> str:
    """What to change so that the step waits less, from the usage of some seconds of waiting steps.

    `cores` are those that this process may use.
    """
    workers, ahead = config.workers, config.prefetch_batches
    threads = min(workers, ahead)
    busy = usage.seconds / (seconds * threads)
    computing = usage.cpu_seconds / usage.seconds if usage.seconds else 0.0
    found = f"threads are busy {min(busy, 1):.0%} of the time and compute {computing:.0%} of that"
    if busy < _BUSY:
        return f"{found}: batches come late by turns; raise data.prefetch_batches ({ahead})"
    if ahead < workers:
        return (
            f"{found}: data.prefetch_batches {ahead} leaves data.workers {workers} without work; "
            f"raise it to {workers} or more"
        )
    if computing < _COMPUTING:
        return f"{found}: they wait for the storage; raise data.workers ({workers})"
    if workers < cores:
        return f"{found}: raise data.workers ({workers}), there are {cores} cores"
    lighter = _LIGHTER.get(config.format, "give the process more cores")
    return f"{found}, and there are {cores} cores: {lighter}"


_BUSY, _COMPUTING = 0.85, 0.5
"""shares of time from which threads count as busy, and as computing"""
_LIGHTER = {
    "raw": "encode the pictures once (`sd-perf data encode`, data.format encoded)",
    "moments": "half the bytes are enough (`sd-perf data encode`, data.format encoded)",
}
"""by data.format: what needs less work per sample"""
