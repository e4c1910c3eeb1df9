"""The MLPerf log of a run: reading it, and writing what ruleset 5.0.0 asks for.

Lines are written through MLCommons' own `mlperf_logging.mllog`, and nowhere else in the package.
Their order satisfies every ruleset from 3.1.0 to 5.0.0: cache_clear and submission_*, init_start,
the constants of the run, init_stop, run_start, blocks. Evaluations and run_stop follow later, with
the times at which they happened.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from sd_perf.config import Config
from sd_perf.errors import DataError, UserError
from sd_perf.files import (
    RESTORE,
    disk_errors,
    misfit,
    one_line,
    parse_json,
    quoted,
    untrusted_text,
    written_aside,
)
from sd_perf.mlperf.rules import CLIP_TARGET, FID_TARGET
from sd_perf.optional import optional
from sd_perf.runs.checkpoints import MAKE_ROOM

LOG_NAME = "result_0.txt"
SUPERSEDED = "mlperf.superseded.txt"
"""beside the log: lines of blocks that were trained again after a kill"""
BENCHMARK = "stable_diffusion"
BLOCK = "training_step"
"""value of a block's lines, as published logs have it"""
_TOKEN = ":::MLLOG "
"""what an entry starts with"""
_OF_A_BLOCK = ("block_start", "block_stop", "tracked_stats")
_BLOCK = {"metadata": {"samples_count": int}}
_SHAPES: dict[str, dict[str, Any]] = {
    "block_start": _BLOCK,
    "block_stop": _BLOCK,
    "eval_accuracy": {"value": float, "metadata": {"samples_count": int, "metric": str}},
    "tracked_stats": {"metadata": {"samples_count?": int}},
    "run_stop": {"metadata": {"status": {"success", "aborted"}}},
}
"""key -> shape (see `sd_perf.files.require_shape`) of the events that a run reads back"""

Kind = Literal["event", "start", "end"]
Status = Literal["success", "aborted"]


class Event(NamedTuple):
    """One entry of a log; `time_ms` is in milliseconds since 1970."""

    key: str
    value: Any
    metadata: dict[str, Any]
    time_ms: int
    line: int
    """its number in the file, from 1"""


def import_mlperf(module: str) -> ModuleType:
    """Import a module of mlperf-logging; ConfigError where the package is missing."""
    return optional(
        f"mlperf_logging.{module}", "mlperf.division: MLPerf logs need mlperf-logging", "mlperf"
    )


def read_log(path: Path) -> list[Event]:
    """The events of a run's own log in file order.

    DataError where it is missing, or has a line that is damaged or not as `MLPerfLog` writes it.
    """
    events, damaged = scan_log(path)
    for event in events:
        if fault := misfit(event._asdict(), _SHAPES.get(event.key, {})):
            damaged.append(f"{event.key} cannot be used ({fault})")
    if damaged:
        raise DataError(f"{path}: {damaged[0]}; {RESTORE}")
    return events


def scan_log(path: Path) -> tuple[list[Event], list[str]]:
    """The events of a log in file order, and a sentence for each damaged line.

    As in the official parser, only \\n, \\r and both end a line, and text before the last
    `:::MLLOG` of a line is ignored: launchers put ranks there. Raises DataError for a file that is
    missing or cannot be read.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such MLPerf log")
    events: list[Event] = []
    damaged: list[str] = []
    # str.splitlines would also split at characters that may stand in a name, such as U+0085.
    lines = untrusted_text(
        path, remedy="give the log of a run", kind=DataError, encoding="utf-8", errors="replace"
    )
    for number, line in enumerate(lines, 1):
        if _TOKEN not in line:
            continue
        try:
            events.append(_event(parse_json(line.rpartition(_TOKEN)[2]), number))
        except ValueError as error:
            damaged.append(f"line {number} is damaged ({one_line(error)})")
    return events, damaged


def _event(entry: Any, line: int) -> Event:
    """The event of a line's JSON; ValueError where it is none."""
    if not isinstance(entry, dict):
        raise ValueError("it is no JSON object")
    missing = [key for key in ("key", "value", "metadata", "time_ms") if key not in entry]
    if missing:
        raise ValueError(f"it has no {missing[0]!r}")
    metadata = entry["metadata"] or {}
    if fault := misfit({**entry, "metadata": metadata}, {"key": str, "metadata": {}}):
        raise ValueError(fault)
    try:
        time_ms = int(float(entry["time_ms"]))
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"time_ms is {quoted(entry['time_ms'])}, not a number") from None
    return Event(entry["key"], entry["value"], metadata, time_ms, line)


class MLPerfLog:
    """Appends to the log of one run.

    A resumed run opens the log again: keys that must occur once are not repeated. Raises UserError
    where the disk refuses.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self._config = config
        _drop_cut_line(path)
        self._keys = {event.key for event in read_log(path)} if path.is_file() else set()
        # Not from logging.getLogger, so that no handler of the application sees the lines.
        logger = logging.Logger("sd_perf.mlperf")
        self._file = _LogFile(path, encoding="utf-8", delay=True)
        logger.addHandler(self._file)
        root = str(Path(__file__).parents[2])  # taken off the file names that the lines carry
        self._mllogger = import_mlperf("mllog.mllog").MLLogger(logger, root_dir=root)

    def start_init(self, time_ms: int | None = None) -> None:
        """Write cache_clear, submission_* and init_start.

        submission_division precedes init_start because the checker takes from it how long the
        initialisation may last.
        """
        mlperf = self._config.mlperf
        self._once("event", "cache_clear", mlperf.caches_cleared, time_ms)
        self._once("event", "submission_benchmark", BENCHMARK, time_ms)
        self._once("event", "submission_division", mlperf.division, time_ms)
        for name in ("org", "platform", "status"):
            if getattr(mlperf, name):
                self._once("event", f"submission_{name}", getattr(mlperf, name), time_ms)
        for check in mlperf.waive:
            self._once("event", "sd_perf_waived", check, time_ms)
        self._once("start", "init_start", None, time_ms)

    def describe(self, seed: int, train_samples: int) -> None:
        """Write the constants of the run; `train_samples` is the size of the training set."""
        optimizer, training = self._config.optimizer, self._config.training
        values: dict[str, Any] = {
            "seed": seed,
            "train_samples": train_samples,
            "eval_samples": self._config.evaluation.num_prompts,
            "gradient_accumulation_steps": training.accumulate_steps,
            "global_batch_size": training.global_batch_size,
            "opt_name": "adamw",
            "opt_adamw_beta_1": optimizer.beta_1,
            "opt_adamw_beta_2": optimizer.beta_2,
            "opt_adamw_epsilon": optimizer.epsilon,
            "opt_adamw_weight_decay": optimizer.weight_decay,
            # the rate after warm-up, as submissions log it
            "opt_base_learning_rate": self._config.learning_rate,
            "opt_learning_rate_warmup_steps": optimizer.warmup_steps,
        }
        if optimizer.decay_steps:  # the open division alone has these
            values["opt_learning_rate_decay_schedule"] = "linear"
            values["opt_learning_rate_decay_steps"] = optimizer.decay_steps
            values["opt_learning_rate_decay_factor"] = optimizer.decay_end
        for key, value in values.items():
            self._once("event", key, value)

    def start_run(self) -> None:
        """Write init_stop and run_start; UserError where the log has its run_stop already."""
        if "run_stop" in self._keys:
            raise UserError(
                f"{self.path}: has its run_stop, so this run cannot go on; begin anew with --fresh"
            )
        self._once("end", "init_stop")
        self._once("start", "run_start")

    def start_block(self, samples: int) -> None:
        """Write block_start at position `samples`.

        Nothing is written where an earlier process of the run left open a block that holds it.
        What a killed process logged of blocks after the checkpoint that this one continues from is
        moved to SUPERSEDED: those steps are taken again.
        """
        self._set_aside_blocks_after(samples)
        start = self._open_block()
        if start is None or start.metadata["samples_count"] > samples:
            self._write("start", "block_start", BLOCK, samples_count=samples)

    def stop_block(
        self, samples: int, time_ms: int | None = None, max_memory: float | None = None
    ) -> None:
        """Write block_stop for the checkpoint at position `samples`, after its last update, and
        tracked_stats of the block.

        The block's throughput (samples/s) and train_step_time (s) are of all its time, that between
        two processes of the run included. `max_memory` is the most that a GPU has held, GB.
        """
        start = self._open_block()
        now = time.time_ns() // 1_000_000 if time_ms is None else time_ms
        self._write("end", "block_stop", BLOCK, now, samples_count=samples)
        batch = self._config.training.global_batch_size
        trained = samples - start.metadata["samples_count"] if start else 0
        if start is None or trained <= 0 or now <= start.time_ms:
            return
        seconds = (now - start.time_ms) / 1000
        stats = {"throughput": trained / seconds, "train_step_time": seconds * batch / trained}
        if max_memory is not None:
            stats["max_memory_usage"] = max_memory
        position = {"samples_count": samples, "step_num": samples // batch}
        self._write("event", "tracked_stats", stats, now, **position)

    def _set_aside_blocks_after(self, samples: int) -> None:
        lost = {
            event.line
            for event in read_log(self.path)
            if event.key in _OF_A_BLOCK and event.metadata.get("samples_count", 0) > samples
        }
        if not lost:
            return
        self._file.close()  # it opens again at the next line
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [line for number, line in enumerate(lines, 1) if number not in lost]
        with disk_errors(self.path, MAKE_ROOM):
            with self.path.with_name(SUPERSEDED).open("ab") as file:
                file.writelines(lines[number - 1] for number in sorted(lost))
            with written_aside(self.path) as draft:
                draft.write_bytes(b"".join(kept))

    def _open_block(self) -> Event | None:
        """The block_start that no block_stop follows."""
        keys = ("block_start", "block_stop")
        blocks = [event for event in read_log(self.path) if event.key in keys]
        return blocks[-1] if blocks and blocks[-1].key == "block_start" else None

    def add_evaluation(
        self, samples: int, fid: float, clip: float, start_ms: int, stop_ms: int
    ) -> None:
        """Write eval_start, eval_accuracy of FID and of CLIP, and eval_stop.

        Raises ValueError for a score that is not finite.
        """
        if not (math.isfinite(fid) and math.isfinite(clip)):
            raise ValueError(f"FID {fid} and CLIP {clip} at {samples:,} samples cannot be logged")
        self._write("start", "eval_start", None, start_ms, samples_count=samples)
        self._write("event", "eval_accuracy", fid, stop_ms, samples_count=samples, metric="FID")
        self._write("event", "eval_accuracy", clip, stop_ms, samples_count=samples, metric="CLIP")
        self._write("end", "eval_stop", None, stop_ms, samples_count=samples)

    def conclude(self, fid_target: float = FID_TARGET, clip_target: float = CLIP_TARGET) -> Status:
        """Write run_stop, unless the log has it; returns the status in the log.

        The status is "success", at the end of the block of the first checkpoint that passes both
        targets. Where none does it is "aborted", at the end of the last block. Raises UserError
        where no block has ended.
        """
        events = read_log(self.path)
        for event in events:
            if event.key == "run_stop":
                return event.metadata["status"]
        ends = {
            event.metadata["samples_count"]: event.time_ms
            for event in events
            if event.key == "block_stop"
        }
        passing = [
            samples
            for samples, scores in logged_scores(events).items()
            if samples in ends and passes(scores, fid_target, clip_target)
        ]
        if not ends:
            raise UserError(
                f"{self.path}: no block has ended; train to the first checkpoint before evaluating"
            )
        at = min(passing, default=max(ends))
        status: Status = "success" if passing else "aborted"
        step = at // self._config.training.global_batch_size
        place = {"samples_count": at, "step_num": step}
        self._once("end", "run_stop", None, ends[at], status=status, **place)
        return status

    def _once(
        self, kind: Kind, key: str, value: Any = None, time_ms: int | None = None, **metadata: Any
    ) -> None:
        if key not in self._keys:
            self._write(kind, key, value, time_ms, _depth=4, **metadata)

    def _write(
        self,
        kind: Kind,
        key: str,
        value: Any = None,
        time_ms: int | None = None,
        _depth: int = 3,
        **metadata: Any,
    ) -> None:
        # The line names as its place in the source who called the public method, `_depth` - 1
        # frames above this one.
        log = getattr(self._mllogger, kind)
        log(key, value, metadata, time_ms=time_ms, stack_offset=_depth)
        self._keys.add(key)


def logged_scores(events: list[Event], place: str = "samples_count") -> dict[int, dict[str, float]]:
    """The evaluations in a log: {samples: {"FID": ..., "CLIP": ...}}, by ascending samples.

    Where a score was logged more than once, the last line counts. `place` is where the position
    stands: `step_num`, steps, in logs of ruleset 3.1.0.
    """
    scores: dict[int, dict[str, float]] = defaultdict(dict)
    shape = {place: float, "metric": str}
    for event in events:
        if event.key == "eval_accuracy" and not misfit(event.metadata, shape):
            scores[event.metadata[place]][event.metadata["metric"]] = event.value
    return dict(sorted(scores.items()))


def passes(
    scores: Mapping[str, float], fid_target: float = FID_TARGET, clip_target: float = CLIP_TARGET
) -> bool:
    """Whether both scores of a checkpoint, {"FID": ..., "CLIP": ...}, are there and good enough."""
    fid, clip = scores.get("FID", math.inf), scores.get("CLIP", -math.inf)
    return fid <= fid_target and clip >= clip_target


def _drop_cut_line(path: Path) -> None:
    """Remove an incomplete last line, left by a killed process; the resumed run writes it again."""
    if path.is_file():
        with disk_errors(path, MAKE_ROOM):
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


class _LogFile(logging.FileHandler):
    """A file handler that raises UserError where a line cannot be written.

    logging's own would print a traceback and go on without the line.
    """

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1] or OSError("unknown")
        raise UserError(f"{self.baseFilename}: cannot be written ({one_line(error)}); {MAKE_ROOM}")
