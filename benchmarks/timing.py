"""Timing: a budget of seconds, intervals between calls, and the settled rate in them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch


class Budget:
    """Seconds to spend, counted from construction. `now` gives seconds (tests pass their own)."""

    def __init__(self, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.seconds = seconds
        self._now = now
        self._started = now()

    def left(self) -> float:
        """Seconds left; negative once overspent."""
        return self.seconds - (self._now() - self._started)


class Clock(Protocol):
    """Marks moments in a stream of GPU work."""

    def mark(self) -> None:
        """Mark this moment."""
        ...

    def intervals(self) -> list[float]:
        """Milliseconds between one mark and the next."""
        ...


class CudaClock:
    """A `Clock` of CUDA events on the current stream: marks do not wait, `intervals` does."""

    def __init__(self) -> None:
        self._events: list[torch.cuda.Event] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    def intervals(self) -> list[float]:
        self._events[-1].synchronize()
        return [first.elapsed_time(then) for first, then in pairwise(self._events)]


class WallClock:
    """A `Clock` of the process's time, for work that is done when the call returns."""

    def __init__(self) -> None:
        self._moments: list[float] = []

    def mark(self) -> None:
        self._moments.append(time.perf_counter())

    def intervals(self) -> list[float]:
        return [1000 * (then - first) for first, then in pairwise(self._moments)]


def timed(call: Callable[[], object], count: int, clock: Clock) -> list[float]:
    """Milliseconds of each of `count` calls, one straight after the other."""
    clock.mark()
    for _ in range(count):
        call()
        clock.mark()
    return clock.intervals()


def repetitions(seconds: float, seconds_each: float, least: int, most: int) -> int:
    """How many calls fit into the seconds, but at least `least` and at most `most`."""
    return max(least, min(most, int(seconds / seconds_each)))


def rates(intervals: list[float], batch: int) -> dict[str, float]:
    """Training rates of iterations of `batch` samples, from their milliseconds.

    The rate is the median of the second half, since clocks sink while the chip warms up; the mean
    rate of the first tenth beside it shows by how much.
    """
    settled = statistics.median(intervals[len(intervals) // 2 :])
    first = statistics.mean(intervals[: max(1, len(intervals) // 10)])
    return {
        "samples_per_second": 1000 * batch / settled,
        "samples_per_second_first_tenth": 1000 * batch / first,
        "ms_per_sample": settled / batch,
        "ms_per_iteration": settled,
    }
