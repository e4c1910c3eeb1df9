"""The logs of a submission: finding them, and what a log says of its run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sd_perf.errors import DataError
from sd_perf.files import misfit, quoted
from sd_perf.mlperf.log import BENCHMARK, Event, logged_scores, passes, scan_log
from sd_perf.mlperf.notes import faults
from sd_perf.mlperf.official import require_ruleset
from sd_perf.mlperf.rulesets import ruleset_of

RUNS = 10
"""of a submission"""


@dataclass(frozen=True)
class Result:
    """What the log of one run says. What it does not say is None."""

    path: Path
    name: str
    """in few words: the file's, with its folder's where the logs lie in several"""
    batch: int
    """samples of a step"""
    division: str
    seeds: tuple[Any, ...]
    status: str
    """of run_stop: success or aborted"""
    samples: int | None
    """to converge: of the first checkpoint that passes; steps in a log of ruleset 3.1.0"""
    platform: str


def logs_of(paths: Sequence[Path]) -> list[Path]:
    """The MLPerf logs that files, run folders and folders of logs hold, in the order given.

    A folder gives its own result_*.txt by number; where it has none, those of all folders below it.
    Raises DataError where one holds none, and where a log is given twice.
    """
    logs = [log for path in paths for log in _logs_in(path)]
    seen: set[Path] = set()
    for log in logs:
        if log.resolve() in seen:
            raise DataError(f"{log}: is given twice; name each log once")
        seen.add(log.resolve())
    return logs


def _logs_in(path: Path) -> list[Path]:
    if not path.is_dir():
        if not path.is_file():
            raise DataError(f"{path}: no such MLPerf log; give a log, a run folder or a folder")
        return [path]
    found = sorted(path.glob("result_*.txt"), key=_by_number)
    found = found or sorted(path.rglob("result_*.txt"), key=_by_number)
    if not found:
        raise DataError(
            f"{path}: no such MLPerf log (result_*.txt) in it or below it; runs have one where "
            "mlperf.division is closed or open"
        )
    return found


def _by_number(path: Path) -> tuple[Path, int, str]:
    number = re.search(r"(\d+)$", path.stem)
    return path.parent, int(number[1]) if number else -1, path.name


def one_set(paths: Sequence[Path]) -> list[Path]:
    """`logs_of` the runs of one submission; DataError for logs of several systems."""
    logs = logs_of(paths)
    folders = sorted({log.parent for log in logs})
    numbered = [folder for folder in folders if sum(log.parent == folder for log in logs) > 1]
    if numbered and len(folders) > 1:
        names = ", ".join(map(str, folders[:4]))
        raise DataError(
            f"these are logs of {len(folders)} folders ({names}{' ...' * (len(folders) > 4)}); "
            "name one of them"
        )
    return logs


def read_results(
    logs: Sequence[Path], ruleset: str | None = None, *, finished: bool = True
) -> tuple[list[Result], str]:
    """What each log says, and their common ruleset: the one given, or that of their round.

    Raises DataError where a log cannot be used, where batch sizes, divisions or rounds differ, and,
    with `finished`, where a run has no run_stop.
    """
    events = [_whole_events(log) for log in logs]
    if ruleset is None:
        rounds = {ruleset_of(of_log)[0]: log for log, of_log in zip(logs, events, strict=True)}
        if len(rounds) > 1:
            raise DataError(f"these are logs of several rounds: {_named(rounds)}; name --ruleset")
        ruleset = next(iter(rounds))
    require_ruleset(ruleset)
    together = len({log.parent for log in logs}) == 1
    results = [
        dataclasses.replace(
            _result(log, of_log, ruleset, finished),
            name=log.name if together else f"{log.parent.name}/{log.name}",
        )
        for log, of_log in zip(logs, events, strict=True)
    ]
    for name in ("batch", "division"):
        values = {getattr(result, name): result.path for result in results}
        if len(values) > 1:
            words = {"batch": "global batch sizes", "division": "divisions"}[name]
            raise DataError(
                f"the runs have different {words}: {_named(values)}; a submission has one"
            )
    return results, ruleset


def _named(values: dict[Any, Path]) -> str:
    return ", ".join(f"{value} ({path})" for value, path in values.items())


def _whole_events(log: Path) -> list[Event]:
    events, damaged = scan_log(log)
    if damaged:
        raise DataError(f"{log}: {damaged[0]}; sd-perf mlperf check has every finding")
    return events


def _result(log: Path, events: list[Event], ruleset: str, finished: bool) -> Result:
    for fault in faults(events, ruleset):
        raise DataError(f"{log}: {fault}")
    values: dict[str, list[Any]] = {}
    for event in events:
        values.setdefault(event.key, []).append(event.value)
    batch = values.get("global_batch_size", [None])[-1]
    if misfit(batch, int) or batch <= 0:
        why = "has no global_batch_size" if batch is None else f"says {quoted(batch)} of its batch"
        raise DataError(f"{log}: {why}; log a whole number as global_batch_size before init_stop")
    if finished and ("run_start" not in values or "run_stop" not in values):
        key = "run_start" if "run_start" not in values else "run_stop"
        raise DataError(
            f"{log}: has no {key}, so the run is not over; train to its end, and sd-perf evaluate"
        )
    stop = next((event for event in reversed(events) if event.key == "run_stop"), None)
    status = str(stop.metadata.get("status", "")) if stop else ""
    if stop and status not in ("success", "aborted"):
        raise DataError(
            f"{log}: line {stop.line}: run_stop has no status success or aborted in its metadata; "
            "log it with one"
        )
    place = "step_num" if ruleset == "3.1.0" else "samples_count"
    passing = [at for at, scores in logged_scores(events, place).items() if passes(scores)]
    if status == "success" and not passing:
        raise DataError(
            f"{log}: its run_stop says success, and no evaluation passes FID 90 and CLIP 0.15; "
            "its targets were looser: evaluate a run whose evaluation.fid_target and clip_target "
            "are the benchmark's, or log aborted"
        )
    return Result(
        path=log,
        name=log.name,
        batch=batch,
        division=str(values.get("submission_division", [""])[0]),
        seeds=tuple(values.get("seed", ())),
        status=status,
        samples=min(passing) if passing and status == "success" else None,
        platform=str(values.get("submission_platform", [""])[0]),
    )


def counted(results: Sequence[Result]) -> str:
    """`1 run`, `2 runs`."""
    return f"{len(results)} run{'s' * (len(results) != 1)}"


@contextmanager
def as_submitted(logs: Sequence[Path]) -> Iterator[Path]:
    """A temporary folder with the logs as result_0.txt, result_1.txt, ..., as the tools want them.

    Lines are ordered by no tool but the RCP checker, which must see evaluations before run_stop and
    the benchmark's name before both: the copies have them so.
    """
    with TemporaryDirectory(prefix="sd_perf_mlperf_") as name:
        folder = Path(name) / BENCHMARK
        folder.mkdir()
        for number, log in enumerate(logs):
            lines = log.read_bytes().splitlines(keepends=True)
            lines = [line if line.endswith((b"\n", b"\r")) else line + b"\n" for line in lines]
            lines.sort(key=_rcp_order)
            (folder / f"result_{number}.txt").write_bytes(b"".join(lines))
        yield folder


def _rcp_order(line: bytes) -> int:
    if b'"submission_benchmark"' in line:
        return 0
    return 2 if b'"run_stop"' in line else 1
