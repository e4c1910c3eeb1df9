"""What is told of several runs side by side: tables with a column per run, as text."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sd_perf.errors import UserError
from sd_perf.tools.report.config_table import in_words
from sd_perf.tools.report.run_contents import RunContents, as_dict, read_run
from sd_perf.tools.scores import SCORES, Score

MAX_RUNS = 8
"""that a page has colours for, and a reader eyes"""
NOTHING = "–"

Row = list[str]
"""a name, and a cell per run"""


def read_runs(folders: Sequence[Path]) -> list[RunContents]:
    """Two to eight runs; UserError for another number, and where `read_run` raises it."""
    if not 2 <= len(folders) <= MAX_RUNS:
        raise UserError(f"compare: {len(folders)} run folders given; give two to {MAX_RUNS}")
    return [read_run(folder) for folder in folders]


def names(runs: Sequence[RunContents]) -> list[str]:
    """The folder's name of each run, or the path as it was given where two have the same."""
    short = [run.folder.resolve().name for run in runs]
    times = Counter(short)
    return [
        name if times[name] == 1 else str(run.folder) for name, run in zip(short, runs, strict=True)
    ]


def results(runs: Sequence[RunContents]) -> list[Row]:
    """Position, loss, throughput and scores of the runs."""
    common = min(run.metrics[-1]["samples"] if run.metrics else 0 for run in runs)
    rows = [
        _row("samples", runs, _position),
        _row("loss, last tenth", runs, lambda run: _loss(run, run.position)),
        _row(f"loss at {common:,} samples", runs, lambda run: _loss(run, common)),
        _row("samples/s, median", runs, lambda run: _median(run, "samples_per_second")),
        _row("wait for data, % of time", runs, lambda run: _median(run, "data_wait", 100)),
        *([score.name, *(_newest(run, score) for run in runs)] for score in SCORES),
        *_scores_at_one_position(runs),
        _row("damaged lines, left out", runs, lambda run: f"{len(run.damaged) or NOTHING}"),
    ]
    return [row for row in rows if set(row[1:]) != {NOTHING}]


def config_differences(runs: Sequence[RunContents]) -> list[Row]:
    """The keys of the configs that differ, without the run's folder, and their values."""
    flat = [dict(_flat(run.manifest["config"])) for run in runs]
    keys = dict.fromkeys(key for config in flat for key in config if key != "run.dir")
    rows = [
        [key, *(in_words(config[key]) if key in config else NOTHING for config in flat)]
        for key in keys
    ]
    return _differing(rows)


def ground_differences(runs: Sequence[RunContents]) -> list[Row]:
    """Source, versions and machines that differ: what a difference in speed may come from."""
    packages = dict.fromkeys(name for run in runs for name in as_dict(run.manifest.get("versions")))
    rows = [
        _row("machine", runs, _machine),
        _row("git SHA", runs, lambda run: str(run.manifest.get("git_sha") or NOTHING)[:20]),
        *([name, *(_version(run, name) for run in runs)] for name in packages),
        *([f"kernel {op}", *(_backend(run, op) for run in runs)] for op in _ops(runs)),
    ]
    return _differing(rows)


def _row(name: str, runs: Sequence[RunContents], cell: Callable[[RunContents], str]) -> Row:
    return [name, *map(cell, runs)]


def _differing(rows: list[Row]) -> list[Row]:
    return [row for row in rows if len(set(row[1:])) > 1]


def _position(run: RunContents) -> str:
    complete = run.total is not None and run.position >= run.total
    of = "" if run.total is None or complete else f" of {run.total:,}"
    return f"{run.position:,}{of}"


def _loss(run: RunContents, position: int) -> str:
    """Mean over the logged steps of the last tenth before a position."""
    losses = [line["loss"] for line in run.metrics if 0.9 * position < line["samples"] <= position]
    return f"{statistics.fmean(losses):.4f}" if losses else NOTHING


def _median(run: RunContents, key: str, scale: float = 1) -> str:
    values = [scale * line[key] for line in run.metrics]
    return f"{statistics.median(values):,.1f}" if values else NOTHING


def _newest(run: RunContents, score: Score) -> str:
    lines = score.lines(run.scores)
    if not lines:
        return NOTHING
    return f"{score.text(lines[-1])} (at {lines[-1]['samples']:,}, n {lines[-1]['n']:,})"


def _scores_at_one_position(runs: Sequence[RunContents]) -> list[Row]:
    """Each score at the last position where all runs have it of equally many pictures."""
    rows = []
    for score in SCORES:
        by_place = [
            {(line["samples"], line["n"]): line for line in score.lines(run.scores)} for run in runs
        ]
        if shared := set.intersection(*map(set, by_place)):
            place = max(shared)
            cells = [score.text(of_run[place]) for of_run in by_place]
            rows.append([f"{score.name} at {place[0]:,}, n {place[1]:,}", *cells])
    return rows


def _flat(tree: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Keys such as `training.seed` of a manifest's config, which any version may have written."""
    flat = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat += _flat(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return flat


def _machine(run: RunContents) -> str:
    machine = as_dict(run.manifest.get("machine"))
    gpus = machine.get("gpus") or []
    return f"{len(gpus)} × {gpus[0]}" if gpus else f"{machine.get('cpus', NOTHING)} CPU cores"


def _version(run: RunContents, package: str) -> str:
    return str(as_dict(run.manifest.get("versions")).get(package, NOTHING))


def _ops(runs: Sequence[RunContents]) -> list[str]:
    return list(dict.fromkeys(choice["op"] for run in runs for choice in run.kernels or []))


def _backend(run: RunContents, op: str) -> str:
    chosen = (choice["backend"] for choice in run.kernels or [] if choice["op"] == op)
    return next(chosen, NOTHING)
