"""What the official checker passes over, or breaks off at without saying why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

from sd_perf.mlperf.log import BENCHMARK, Event, logged_scores
from sd_perf.mlperf.rules import CLIP_TARGET, EVAL_SAMPLES, FID_TARGET

TRAIN_SAMPLES = 6_513_144
"""samples of the benchmark's training set"""
_METRICS = ("FID", "CLIP")


def faults(events: list[Event]) -> Iterator[str]:
    """Reasons, a sentence each, for which the checker stops with an error of Python."""
    values = _values(events)
    if not events:
        yield "holds no MLPerf log lines (:::MLLOG)"
    for division in values["submission_division"]:
        if division not in ("closed", "open"):
            yield f"submission_division is {division!r}; it must be 'closed' or 'open'"
    for benchmark in values["submission_benchmark"]:
        if benchmark != BENCHMARK:
            yield f"submission_benchmark is {benchmark!r}; only {BENCHMARK!r} is checked here"
    metrics: dict[str, set[str]] = defaultdict(set)
    for event in events:
        if event.key == "eval_accuracy" and "samples_count" not in event.metadata:
            yield (
                "an eval_accuracy has no samples_count in its metadata; logs of 2023 have step_num "
                "instead and need --ruleset 3.1.0"
            )
            return
        if event.key == "eval_accuracy":
            metrics[str(event.metadata["samples_count"])].add(str(event.metadata.get("metric")))
    for samples, found in metrics.items():
        if missing := " and ".join(metric for metric in _METRICS if metric not in found):
            names = " and ".join(sorted(found))
            yield f"the evaluation at {samples} samples has {names} without {missing}"


def notes(events: list[Event]) -> Iterator[str]:
    """What deserves a look in a log that passes the checker, a sentence each."""
    values = _values(events)
    if not values["seed"]:
        yield "there is no seed; the check of a whole submission needs one"
    for key in ("global_batch_size", "submission_division", "submission_benchmark"):
        if len(set(map(str, values[key]))) > 1:
            yield f"{key} has several values: {', '.join(map(str, values[key]))}"
    if values["submission_division"] == ["closed"]:
        counts = {"eval_samples": EVAL_SAMPLES, "train_samples": TRAIN_SAMPLES}
        odd = [(key, value) for key in counts for value in values[key] if value != counts[key]]
        for key, value in odd:
            yield f"{key} is {value}, and the closed division's is {counts[key]}"
    yield from _times(events)


def _times(events: list[Event]) -> Iterator[str]:
    """Notes on events that ended before they began."""
    first = {event.key: event for event in reversed(events)}
    order = ("init_start", "init_stop", "run_start", "run_stop")
    present = [first[key] for key in order if key in first]
    for earlier, later in pairwise(present):
        if later.time_ms < earlier.time_ms:
            yield f"the time of {later.key} is before that of {earlier.key}"
    start: Event | None = None
    for event in events:
        if event.key == "block_start":
            start = event
        elif event.key == "block_stop" and start and event.time_ms < start.time_ms:
            yield f"a block_stop is before its block_start (at time {start.time_ms})"
    passing = [
        samples
        for samples, scores in logged_scores(events).items()
        if scores.get("FID", FID_TARGET + 1) <= FID_TARGET and scores.get("CLIP", -1) >= CLIP_TARGET
    ]
    ends = {
        event.metadata.get("samples_count"): event.time_ms
        for event in events
        if event.key == "block_stop"
    }
    stop = first.get("run_stop")
    if stop and passing and stop.time_ms < ends.get(min(passing), stop.time_ms):
        yield f"run_stop is before the end of the block that passes (at {min(passing)} samples)"


def _values(events: list[Event]) -> dict[str, list[object]]:
    """The values of each key, in the order of the log."""
    values: dict[str, list[object]] = defaultdict(list)
    for event in events:
        values[event.key].append(event.value)
    return values
