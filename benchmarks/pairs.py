"""Sides that do the same work, timed in turns on one machine: their ratio is what counts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

from sd_perf.tools.results import Conditions


class PairRow(Conditions):
    """A side of a comparison and its rival, which does the same work in the same run."""

    work: str
    """what is timed"""
    side: str
    rival: str
    threads: int
    """of CPU arithmetic, each side"""
    clock: str
    """wall, or CPU: seconds of the process's own, to which other processes do not add"""
    side_s: float
    """median seconds"""
    rival_s: float
    ratio: float
    """median over the turns of the rival's seconds over the side's: above 1 the side is faster"""
    ratio_low: float
    ratio_high: float
    """lowest and highest of the turns"""
    turns: int


def in_turns(
    sides: Mapping[str, Callable[[], object]],
    turns: int,
    warm_up: int = 1,
    now: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each side in each of `turns` turns, after `warm_up` turns that are not kept.

    The order is reversed from turn to turn, so that no side always comes after the same other one.
    `now` gives seconds: `time.process_time` leaves out what other processes take of the cores.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(-warm_up, turns):
        order = list(sides.items())
        for name, side in order if turn % 2 else reversed(order):
            start = now()
            side()
            if turn >= 0:
                seconds[name].append(now() - start)
    return seconds


def pair_row(
    work: str,
    seconds: Mapping[str, list[float]],
    side: str,
    rival: str,
    conditions: Conditions,
    threads: int,
    clock: str = "wall",
) -> PairRow:
    """A row of two of the sides that `in_turns` timed by that clock."""
    ratios = [theirs / ours for ours, theirs in zip(seconds[side], seconds[rival], strict=True)]
    return {
        **conditions,
        "work": work,
        "side": side,
        "rival": rival,
        "threads": threads,
        "clock": clock,
        "side_s": statistics.median(seconds[side]),
        "rival_s": statistics.median(seconds[rival]),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "turns": len(ratios),
    }
