"""What the official checker passes over, or breaks off at without saying why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

from sd_perf.files import misfit, quoted
from sd_perf.mlperf.findings import in_lines
from sd_perf.mlperf.log import BENCHMARK, Event, logged_scores, passes
from sd_perf.mlperf.rules import EVAL_SAMPLES, RULESET

TRAIN_SAMPLES = 6_513_144
"""samples of the benchmark's training set"""
_METRICS = ("FID", "CLIP")
_SLACK_MS = 1000
"""that run_stop may be before its block_stop, which is logged a little after the last update"""


def faults(events: list[Event], ruleset: str = RULESET) -> Iterator[str]:
    """Reasons, a sentence each, for which the checker stops with an error of Python."""
    if not events:
        yield "holds no MLPerf log lines (:::MLLOG); give the log of a run"
    for event in events:
        if event.key == "submission_division" and event.value not in ("closed", "open"):
            yield (
                f"line {event.line}: submission_division is {quoted(event.value)}; it must be "
                "'closed' or 'open'"
            )
        if event.key == "submission_benchmark" and event.value != BENCHMARK:
            yield (
                f"line {event.line}: submission_benchmark is {quoted(event.value)}; only "
                f"{BENCHMARK!r} is checked here"
            )
    yield from _faulty_evaluations(events, ruleset)


def _faulty_evaluations(events: list[Event], ruleset: str) -> Iterator[str]:
    """Evaluations that are not a FID and a CLIP score at one position."""
    place = "step_num" if ruleset == "3.1.0" else "samples_count"
    metrics: dict[str, dict[str, int]] = defaultdict(dict)
    for event in (event for event in events if event.key == "eval_accuracy"):
        if place not in event.metadata:
            other = "" if ruleset == "3.1.0" else "; logs of 2023 have step_num and need "
            yield (
                f"line {event.line}: an eval_accuracy has no {place} in its metadata"
                f"{other + '--ruleset 3.1.0' if other else ', as 3.1.0 wants'}"
            )
            return
        if misfit(event.metadata[place], float):
            yield (
                f"line {event.line}: {place} of an eval_accuracy is "
                f"{quoted(event.metadata[place])}, not a number"
            )
            return
        metric = str(event.metadata.get("metric"))
        metrics[str(event.metadata[place])][metric] = event.line
        if metric in _METRICS and misfit(event.value, float):
            yield f"line {event.line}: {metric} is {quoted(event.value)}, not a number"
    for position, found in metrics.items():
        if missing := " and ".join(metric for metric in _METRICS if metric not in found):
            names = " and ".join(sorted(found))
            unit = "step" if place == "step_num" else "samples"
            at = f"{unit} {position}" if unit == "step" else f"{position} {unit}"
            yield (
                f"the evaluation at {at} ({in_lines(sorted(found.values()))}) has {names} without "
                f"{missing}; log both metrics of a checkpoint, or none"
            )


def notes(events: list[Event]) -> Iterator[str]:
    """What deserves a look in a log that passes the checker, a sentence each."""
    values = _values(events)
    if not values["seed"]:
        yield "there is no seed; the check of a whole submission needs one: log it before init_stop"
    for key in ("global_batch_size", "submission_division", "submission_benchmark"):
        if len(set(map(str, values[key]))) > 1:
            lines = in_lines([event.line for event in events if event.key == key])
            yield (
                f"{key} has several values ({', '.join(map(str, values[key]))}; {lines}); the "
                "tools take the last: keep one run in a log"
            )
    if values["submission_division"] == ["closed"]:
        counts = {"eval_samples": EVAL_SAMPLES, "train_samples": TRAIN_SAMPLES}
        for event in events:
            if event.key in counts and event.value != counts[event.key]:
                yield (
                    f"line {event.line}: {event.key} is {event.value}, and the closed division's "
                    f"is {counts[event.key]}"
                )
    yield from _times(events)


def _times(events: list[Event]) -> Iterator[str]:
    """Notes on events that ended before they began."""
    first = {event.key: event for event in reversed(events)}
    order = ("init_start", "init_stop", "run_start", "run_stop")
    present = [first[key] for key in order if key in first]
    for earlier, later in pairwise(present):
        if later.time_ms < earlier.time_ms:
            yield (
                f"line {later.line}: the time of {later.key} is before that of {earlier.key} "
                f"(line {earlier.line}); the run's minutes come from these"
            )
    start: Event | None = None
    for event in events:
        if event.key == "block_start":
            start = event
        elif event.key == "block_stop" and start and event.time_ms < start.time_ms:
            yield (
                f"line {event.line}: the time of a block_stop is before that of its block_start "
                f"(line {start.line})"
            )
    passing = [samples for samples, scores in logged_scores(events).items() if passes(scores)]
    ends = _block_ends(events)
    stop = first.get("run_stop")
    if stop and passing and stop.time_ms < ends.get(min(passing), stop.time_ms) - _SLACK_MS:
        yield (
            f"line {stop.line}: run_stop is before the end of the block that passes (at "
            f"{min(passing)} samples); its time is that of the passing checkpoint"
        )


def _block_ends(events: list[Event]) -> dict[object, int]:
    """{samples at the end of a block: time of its block_stop}.

    A block_stop counts the samples at the block's end, or, in some published logs, at its start.
    Then the end is where the next block starts, and that of the last block is not told.
    """
    ends: dict[object, int] = {}
    start: object = None
    waiting: int | None = None
    for event in (event for event in events if event.key in ("block_start", "block_stop")):
        position = event.metadata.get("samples_count")
        if misfit(position, float):
            continue
        if event.key == "block_start":
            if waiting is not None:
                ends[position] = waiting
            start, waiting = position, None
        elif position == start:
            waiting = event.time_ms
        else:
            ends[position] = event.time_ms
    return ends


def _values(events: list[Event]) -> dict[str, list[object]]:
    """The values of each key, in the order of the log."""
    values: dict[str, list[object]] = defaultdict(list)
    for event in events:
        values[event.key].append(event.value)
    return values
