"""Scaling of training: strategies, ranks and batch on each rank, a torchrun for each.

    python -m benchmarks.scaling [--ranks 1 2 4 8] [--strategies ddp zero1] [--batches 32 64]

Each row is a run of `benchmarks.throughput` under torchrun, with NCCL on GPUs and gloo on CPUs.
Its efficiency is the rate of a rank over that of a run of one rank with the same batch, where there
is one. A run that fails is a row that says why; the others go on.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import Report, python_path, run_command
from benchmarks.training_run import (
    BENCHMARK_BATCH,
    TINY_BATCH,
    TrainingRow,
    add_config_options,
    config_of,
    make_row,
)
from sd_perf.config import TrainingConfig
from sd_perf.errors import UserError
from sd_perf.tools.results import read

NAME = "scaling"
STRATEGIES: tuple[str, ...] = typing.get_args(typing.get_type_hints(TrainingConfig)["strategy"])
SINGLE = "single"
"""strategy of one rank, which has nothing to exchange"""
LIMIT_SECONDS = 600.0
"""time that a run may take beyond its timed minutes: start, compilation, capture"""


class ScalingRow(TrainingRow):
    """A run of `throughput`, and what is known of it beside others."""

    strategy: str
    efficiency: float | None
    """rate of a rank over that of a run of one rank with the same batch"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    add_config_options(parser)
    add = parser.add_argument
    ranks = "processes, one a GPU (default: 1, 2, 4, ... up to the GPUs here; without GPUs 1 2)"
    add("--ranks", type=int, nargs="+", metavar="N", help=ranks)
    strategies = "how several ranks share the optimizer (default: all)"
    chosen = [name for name in STRATEGIES if name != "auto"]
    add("--strategies", nargs="+", choices=chosen, default=chosen, help=strategies)
    add(
        "--batches",
        type=int,
        nargs="+",
        metavar="N",
        help="samples on each rank, instead of --batch",
    )
    add("--minutes", type=float, default=1.0, help="timed run of each row, min (default: 1)")
    add("--warm-up-steps", type=int, default=30, help="steps before the clock starts (default: 30)")


def runs(options: argparse.Namespace) -> list[tuple[int, str, int]]:
    """(batch, strategy, ranks) of each row, runs of one rank first."""
    gpus = torch.cuda.device_count()
    powers = [2**power for power in range(10) if 2**power <= gpus] or [1, 2]
    batches = options.batches or [
        options.batch or (TINY_BATCH if options.tiny else BENCHMARK_BATCH)
    ]
    ranks = sorted(options.ranks or ([2] if options.tiny else powers))
    strategies = options.strategies[:1] if options.tiny else options.strategies
    return [
        (batch, strategy, count)
        for batch in batches
        for count in ranks
        for strategy in ([SINGLE] if count == 1 else strategies)
    ]


def command_of(options: argparse.Namespace, run: tuple[int, str, int], output: Path) -> list[str]:
    """The command line of a run, which writes its row to `output`."""
    batch, strategy, ranks = run
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    torchrun += ["--log-dir", str(output.parent / "torchrun")]
    settings = [*options.set, *([] if strategy == SINGLE else [f"training.strategy={strategy}"])]
    given: dict[str, Any] = {
        "--batch": batch,
        "--minutes": options.minutes,
        "--warm-up-steps": options.warm_up_steps,
        "--source": options.source,
        "--config": options.config,
        "--shards": options.shards,
        "--git-sha": options.git_sha,
        "--output": output,
    }
    words = [
        str(word) for key, value in given.items() if value is not None for word in (key, value)
    ]
    tiny = ["--tiny"] if options.tiny else []
    last = ["--set", *settings] if settings else []
    return [sys.executable, *torchrun, "-m", "benchmarks.throughput", *words, *tiny, *last]


def start(command: list[str], ranks: int, seconds: float) -> subprocess.CompletedProcess[str]:
    """Run a command of so many ranks to its end; TimeoutExpired after `seconds`."""
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        **os.environ,
        "PYTHONPATH": python_path(),
    }
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)


def measure_one(options: argparse.Namespace, run: tuple[int, str, int]) -> dict[str, Any]:
    """Columns of a `TrainingRow` of one run; `status` and `reason` where it fails."""
    *_, ranks = run
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "row.json"
        command = command_of(options, run, output)
        try:
            done = start(command, ranks, seconds=60 * options.minutes + LIMIT_SECONDS)
        except subprocess.TimeoutExpired as error:
            return {"status": "failed", "reason": f"took longer than {error.timeout:.0f} s"}
        if done.returncode == 0:
            return dict(read(output, "throughput", TrainingRow).rows[0])
    return {"status": "failed", "reason": told(done.stderr) or f"exit code {done.returncode}"}


def told(errors: str) -> str:
    """What a run said of its failure: our sentence, or the last line that names an error."""
    lines = errors.splitlines()
    ours = [line for line in lines if line.startswith("python -m benchmarks.")]
    raised = [line for line in lines if "Error" in line and "ChildFailedError" not in line]
    return (ours or raised or lines or [""])[-1].strip()[:300]


def measure(options: argparse.Namespace) -> int:
    """Every run, one after the other; returns the exit code, 1 where one failed."""
    planned = runs(options)
    for batch, _, ranks in planned:
        if not (0 < ranks <= 1024 and batch > 0):
            raise UserError("--ranks, --batches: give 1 or more (ranks: at most 1,024)")
        options.batch = batch
        config_of(options, ranks)  # says what cannot be used before anything is started
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report(NAME, options, device, ("strategy", "ranks", "batch"))
    alone: dict[int, float] = {}
    for batch, strategy, ranks in planned:
        options.batch = batch
        measured = measure_one(options, (batch, strategy, ranks))
        row: dict[str, Any] = {**make_row(config_of(options, ranks), ranks, measured)}
        rate = row["samples_per_second_per_rank"]
        if ranks == 1 and rate:
            alone[batch] = rate
        efficiency = rate / alone[batch] if rate and batch in alone else None
        report.add({**row, "strategy": strategy, "efficiency": efficiency})
    return int(any(row["status"] != "measured" for row in report.result.rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit code."""
    return run_command(NAME, __doc__, add_options, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
