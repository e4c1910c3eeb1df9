"""The fast and the plain UNet on a GPU: are they right, how fast are they, where does time go?

    python -m benchmarks.gpu_acceptance --output DIR

Five parts, chosen by --parts: `environment` (two measured ceilings), `correctness`, `kernels` (the
heaviest call of each op), `profile` (one fast iteration by op), `throughput`. Wrong code is not
timed.

Writes DIR/gpu_acceptance.json and DIR/kernels_<gpu>.json (rows as kernel_speed.py's), and prints a
summary last. Needs torch, Triton and NumPy alone. Without an install, from the repository root:
PYTHONPATH=kernels python -m benchmarks.gpu_acceptance --output DIR.
Exit code 0: all is well; 1: a check is red or a measurement failed; 2: it cannot run here.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_profile, gpu_throughput, kernel_cases, kernel_speed
from benchmarks.attempts import attempt, release_memory
from benchmarks.checks import Check, guarded, passed
from benchmarks.command import command_parser
from benchmarks.gpu_checks import Group, blocking, check_groups
from benchmarks.gpu_environment import describe, measure_ceilings, software
from benchmarks.gpu_fast import FAST_BF16
from benchmarks.gpu_throughput import ThroughputRow
from benchmarks.timing import Budget
from sd_kernels.targets import Target
from sd_perf.tools.results import KernelRow, Provenance, Result, write

NAME = "gpu_acceptance"
PARTS = ("environment", "correctness", "kernels", "profile", "throughput")
TIMED_PARTS = {"profile", "throughput"}
"""parts that need correctness in the same run"""
KERNELS_SHARE = 0.3
"""largest share of the seconds that `kernels` takes; `throughput` has what is left"""


@dataclass
class Report:
    """What the parts of one run found, saved after each part and row."""

    folder: Path
    """receives gpu_acceptance.json and kernels_<gpu>.json"""
    provenance: Provenance
    ceilings: dict[str, Any] = field(default_factory=dict)
    """measured rates of the GPU, or the reason why there are none"""
    correctness: list[Check] = field(default_factory=list)
    kernels: list[KernelRow] = field(default_factory=list)
    profile: dict[str, Any] = field(default_factory=dict)
    """`gpu_profile.measure_profile`, or the reason why there is none"""
    throughput: list[ThroughputRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float | None = None
    """time that the whole run took"""

    @property
    def gpu(self) -> str:
        """Name of the GPU as the driver gives it."""
        return self.provenance.machine["gpu"]

    @classmethod
    def begun(cls, options: argparse.Namespace) -> Report:
        """A report without findings, of this GPU and these options."""
        machine, versions = describe(), software()
        provenance = Provenance.of_this_run(NAME, machine, versions, options.git_sha)
        return cls(options.output, provenance)

    def result(self) -> Result[ThroughputRow]:
        """The report as it is written: the throughput is its rows."""
        names = ("ceilings", "correctness", "kernels", "profile", "notes", "seconds")
        details = {name: getattr(self, name) for name in names}
        return Result(NAME, self.provenance, self.throughput, details)

    def save(self) -> None:
        """Write gpu_acceptance.json."""
        write(self.folder / f"{NAME}.json", self.result())

    def save_kernels(self, rows: list[KernelRow]) -> None:
        """Keep the rows, and write them into a file of their own that can be committed."""
        self.kernels = rows
        name = re.sub("[^a-z0-9]+", "_", self.gpu.lower())
        result = Result("kernel_speed", self.provenance, rows)
        write(self.folder / f"kernels_{name}.json", result)
        self.save()

    def save_throughput(self, rows: list[ThroughputRow]) -> None:
        """Keep the rows, and save."""
        self.throughput = rows
        self.save()


def run_parts(report: Report, options: argparse.Namespace, budget: Budget) -> None:
    """Run the parts asked for, each into the report."""
    if "environment" in options.parts:
        report.ceilings = attempt(measure_ceilings)
        report.save()
    if "correctness" in options.parts:
        set_arithmetic(timing=False)
        report.correctness = run_checks(check_groups())
        report.save()
    if "kernels" in options.parts:
        measure_kernels(report, budget)
    if not TIMED_PARTS & set(options.parts):
        return
    if not passed(report.correctness):
        report.notes.append("Not all was timed: a check is red, and wrong code has no speed.")
    set_arithmetic(timing=True)
    if "profile" in options.parts:
        report.profile = profile_fast(report.gpu, max(options.batches), report.correctness)
        report.save()
    if "throughput" in options.parts:
        gpu_throughput.measure_rows(
            report.gpu,
            gpu_throughput.plan(options.batches, options.rival_batch),
            budget,
            checks=report.correctness,
            measure_one=gpu_throughput.measure,
            save=report.save_throughput,
        )


def set_arithmetic(timing: bool) -> None:
    """Switch TF32 off, and set how cuDNN chooses convolutions.

    For timing it takes the fastest, otherwise those that repeat themselves bit for bit.
    """
    # Not by `fp32_precision`: after that torch, and Inductor, may no longer read these.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = not timing


def run_checks(groups: list[Group]) -> list[Check]:
    """Every group's checks; a group that raises is one red check."""
    checks: list[Check] = []
    for group in groups:
        started = time.monotonic()
        checks += guarded(group.what, group.run, recipe=group.recipe)
        attempt(release_memory)
        print(f"checked: {group.title} ({time.monotonic() - started:.0f} s)", flush=True)
    return checks


def measure_kernels(report: Report, budget: Budget) -> None:
    """The heaviest call of every op, within its share of the seconds."""
    candidates = kernel_cases.plan(Target.here(), heaviest_only=True)
    seconds = max(0.0, min(budget.left(), KERNELS_SHARE * budget.seconds))
    kernel_speed.run(
        candidates,
        budget=Budget(seconds),
        seconds=kernel_speed.QUICK_SECONDS,
        save=report.save_kernels,
    )


def profile_fast(gpu: str, batch: int, checks: list[Check]) -> dict[str, Any]:
    """One fast iteration by op, measured and predicted; status and reason where there is none."""
    if red := blocking(FAST_BF16, checks):
        return {"status": "red", "reason": f"wrong code has no speed: {red[0]}"}
    ops = gpu_throughput.predictions(gpu, batch).get(FAST_BF16.estimated_as, {}).get("by_op", {})
    predicted = {op: figures["ms_per_sample"] * batch for op, figures in ops.items()}
    profile = attempt(partial(gpu_profile.measure_profile, FAST_BF16, batch, predicted))
    attempt(release_memory)
    return profile


def summary(report: Report) -> str:
    """The report as text: environment, checks, kernels, profile, throughput, notes."""
    source = report.provenance
    lines = [f"{report.gpu}, torch {source.versions['torch']}, {source.date}, {source.git_sha}"]
    lines += [f"ceiling {name}: {value}" for name, value in report.ceilings.items()]
    lines += map(check_line, report.correctness)
    lines += map(kernel_speed.row_line, report.kernels)
    lines += gpu_profile.lines(report.profile) if report.profile else []
    lines += map(gpu_throughput.row_line, report.throughput)
    return "\n".join(lines + report.notes)


def check_line(check: Check) -> str:
    """A check as one line of text."""
    verdict = "ok " if check["passed"] else "RED"
    error = "      nan" if check["error"] is None else f"{check['error']:9.2e}"
    return f"{verdict} {error} (budget {check['budget']:7.1e})  {check['check']}  {check['note']}"


def exit_code(report: Report, parts: list[str]) -> int:
    """1 where a check is red or a measurement failed, else 0.

    Running out of memory or time is a finding, no failure.
    """
    red = "correctness" in parts and not passed(report.correctness)
    red = red or any(map(kernel_speed.is_bad, report.kernels))
    measured = [report.ceilings, report.profile, *report.throughput]
    return int(red or any(found.get("status") == "failed" for found in measured))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line; SystemExit with code 2 where they make no sense."""
    parts = ",".join(PARTS)
    parser = command_parser(NAME, __doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder that receives the results")
    add("--batches", default="8,16,32,64", help="batch sizes (default: 8,16,32,64)")
    add("--rival-batch", type=int, default=32, help="batch of the other UNets (default: 32)")
    add("--parts", default=parts, help=f"parts to run (default: {parts})")
    add("--git-sha", help="commit of this tree, where it lies without git (default: ask git)")
    add("--seconds", type=float, default=420.0, help="time to aim at, s (default: 420)")
    options = parser.parse_args(arguments)
    try:
        options.batches = [int(batch) for batch in options.batches.split(",")]
    except ValueError:
        words = "give whole numbers with commas between them, such as 8,16"
        parser.error(f"--batches {options.batches}: {words}")
    if min(*options.batches, options.rival_batch) < 1:
        parser.error("--batches, --rival-batch: every batch size must be at least 1")
    options.parts = options.parts.split(",")
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        parser.error(f"--parts: no part is called {unknown[0]!r}; choose from {', '.join(PARTS)}")
    timed_parts = sorted(TIMED_PARTS & set(options.parts))
    if timed_parts and "correctness" not in options.parts:
        words = "needs correctness in the same run, since wrong code has no speed"
        parser.error(f"--parts: {timed_parts[-1]} {words}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, print; returns the exit code."""
    options = parse(arguments)
    budget = Budget(options.seconds)
    if not torch.cuda.is_available():
        words = "gpu_acceptance.py measures a CUDA GPU, and torch finds none on this machine."
        print(words, file=sys.stderr)
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    report = Report.begun(options)
    run_parts(report, options, budget)
    report.seconds = round(budget.seconds - budget.left(), 1)
    report.save()
    print(summary(report))
    return exit_code(report, options.parts)


if __name__ == "__main__":
    sys.exit(main())
