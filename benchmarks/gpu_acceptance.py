"""The fast and the plain UNet on a GPU: are they and their kernels right there, how fast are they,
and why not faster.

    python -m benchmarks.gpu_acceptance --output DIR

Writes DIR/gpu_acceptance.json and DIR/kernels_<gpu>.json (rows as those of kernel_speed.py), and
prints a summary last. Runs from the repository root as it is, with torch, Triton and NumPy alone.
Exit code 0: all is well; 1: a check is red or a measurement failed; 2: it cannot run here.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_profile, kernel_speed
from benchmarks.attempts import attempt, release_memory
from benchmarks.gpu_checks import Check, against, gpu_checks, guarded, passed
from benchmarks.gpu_environment import (
    ESTIMATED_AS,
    TELEMETRY_KEYS,
    Telemetry,
    describe,
    git_sha,
    measure_ceilings,
    peak_flops,
)
from benchmarks.gpu_fast import FAST_BF16, FAST_TIMED
from benchmarks.gpu_workload import (
    AUTOCAST,
    COMPILED,
    DIFFUSERS,
    DIFFUSERS_COMPILED,
    MASTERS,
    Recipe,
)
from benchmarks.timing import Budget, CudaClock, rates, repetitions, timed
from sd_kernels.conv.aten import tuned
from sd_kernels.spec import Target
from sd_perf.config import Config, UNetConfig
from sd_perf.files import write_json
from sd_perf.tools.estimate.predict import predict

REPOSITORY = Path(__file__).resolve().parents[1]
PARTS = ("environment", "correctness", "kernels", "profile", "throughput")
TIMED_PARTS = {"profile", "throughput"}
KERNELS_SHARE = 0.3
"""of the seconds, at most, that the kernels take; the throughput has what is left"""
MOST_SECONDS = 15.0
"""of a row, so that what comes late has its share; clocks have settled by then"""
COMPILE_SECONDS = 70.0
"""without which torch.compile of a full-size network is not begun"""
FLOPS_PER_SAMPLE = 2.409e12
"""forward and backward of one sample of the benchmark's UNet, whatever a recipe computes beside
them"""
WARM_UP_ITERATIONS = 3
"""kernels, plans and gradients exist after the first; torch's 11 are for DistributedDataParallel"""
LEAST_REPLAYS, MOST_REPLAYS = 10, 2000
FIRST_LOSS_BUDGET = 1e-3
"""relative difference of the first timed loss from the first warm-up loss: same weights, same
samples"""
ROW_NOTE = (
    "Inputs stay in GPU memory and the sample indices advance, so every iteration draws anew; no "
    "data loader. "
    "Weights are random in every layer. One GPU, optimizer unsharded. Memory: peak after warm-up."
)
MEASURED_KEYS = (
    "samples_per_second",
    "samples_per_second_first_tenth",
    "ms_per_sample",
    "ms_per_iteration",
    "mfu",
    "timed_iterations",
    "peak_memory_bytes",
    "peak_reserved_bytes",
    *TELEMETRY_KEYS,
    "loss_warm_up",
    "loss_start",
    "loss_end",
)


@dataclass(frozen=True)
class Rung:
    """What one row measures."""

    recipe: Recipe
    batch: int
    graph: bool

    @property
    def least_seconds(self) -> float:
        """Without which it is not begun."""
        return COMPILE_SECONDS if self.recipe.compiled else 0.0

    @property
    def most_seconds(self) -> float:
        """Which it should not take longer than."""
        return MOST_SECONDS + self.least_seconds


def plan_rungs(batches: list[int], rival_batch: int) -> list[Rung]:
    """The rows: fast recipes at every batch, largest first, then at one batch what they are
    compared with.

    A fast one also runs without a graph at the smallest batch, where launches weigh most. Compiling
    comes last.
    """
    fast = [Rung(recipe, batch, True) for recipe in FAST_TIMED for batch in reversed(batches)]
    rivals = [
        (AUTOCAST, False),
        (MASTERS, False),
        (AUTOCAST, True),
        (MASTERS, True),
        (DIFFUSERS, False),
    ]
    rivals += [(COMPILED, True), (DIFFUSERS_COMPILED, True)]
    eager = Rung(FAST_BF16, min(batches), False)
    return [*fast, eager, *(Rung(recipe, rival_batch, graph) for recipe, graph in rivals)]


@cache
def predictions(gpu: str, batch: int) -> dict[str, Any]:
    """What `sd-perf estimate` says of a GPU and a batch, by recipe; empty where it says
    nothing."""
    if gpu not in ESTIMATED_AS:
        return {}
    facts = attempt(partial(predict, Config(), ESTIMATED_AS[gpu], batch))
    if "recipes" not in facts:  # what is measured is worth having without it
        print(f"no estimate for batch {batch}: {facts['reason']}", flush=True)
    return facts.get("recipes", {})


def make_row(gpu: str, rung: Rung, measured: dict[str, Any]) -> dict[str, Any]:
    """A row of the report: what was run, every measured key (None where it is missing), and why if
    it is."""
    recipe = rung.recipe
    row: dict[str, Any] = {
        "gpu": gpu,
        "batch": rung.batch,
        "precision": recipe.precision,
        "implementation": recipe.implementation + ("" if rung.graph else "_eager"),
        "graph": rung.graph,
        "attention": recipe.attention.name if recipe.attention else None,
        "kernels": measured.get("kernels"),
    }
    row |= {key: measured.get(key) for key in MEASURED_KEYS}
    rate, peak = row["samples_per_second"], peak_flops(gpu)
    if rate is not None and peak is not None:
        row["mfu"] = rate * FLOPS_PER_SAMPLE / peak
    predicted = predictions(gpu, rung.batch).get(recipe.way) if recipe.way else None
    row["predicted_samples_per_second"] = predicted and predicted["samples_per_second"]
    row["predicted_memory_bytes"] = predicted and predicted["memory_bytes"]["total"]
    return row | {
        "status": measured.get("status", "measured"),
        "reason": measured.get("reason"),
        "notes": ROW_NOTE,
    }


def check_losses(warm_up: float, start: float, end: float) -> None:
    """Raises ValueError where the timed iterations did not train, or did not start where the
    warm-up did."""
    if not abs(start - warm_up) <= FIRST_LOSS_BUDGET * abs(warm_up):
        raise ValueError(
            f"the first timed loss is {start}, but the same iteration in warm-up had {warm_up}"
        )
    if not math.isfinite(end):
        raise ValueError(f"the loss is {end} at the end")


def time_iterations(rung: Rung, seconds: float) -> dict[str, Any]:
    """Measured values of one rung, taking about so many seconds in all. The current stream must be
    a side stream."""
    budget = Budget(seconds)
    workload = rung.recipe.workload(UNetConfig(), rung.batch, "cuda")
    warm_up_losses = []
    with tuned():  # what was timed stays chosen in the capture
        for _ in range(WARM_UP_ITERATIONS):
            workload.iteration()
            warm_up_losses.append(workload.loss.item())
    workload.reset()
    torch.cuda.empty_cache()  # the search for convolution kernels leaves workspaces behind
    torch.cuda.reset_peak_memory_stats()
    call = workload.capture().replay if rung.graph else workload.iteration
    call()
    loss_start = workload.loss.item()
    seconds_each = timed(call, 2, CudaClock())[-1] / 1000
    count = repetitions(budget.left(), seconds_each, LEAST_REPLAYS, MOST_REPLAYS)
    with Telemetry() as telemetry:
        intervals = timed(call, count, CudaClock())
    loss_end = workload.loss.item()
    check_losses(warm_up_losses[0], loss_start, loss_end)
    return {
        **rates(intervals, rung.batch),
        "kernels": dict(workload.kernels) or None,
        "timed_iterations": count,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        **telemetry.summary(),
        "loss_warm_up": warm_up_losses[0],
        "loss_start": loss_start,
        "loss_end": loss_end,
    }


def measure_rung(rung: Rung, seconds: float) -> dict[str, Any]:
    """`time_iterations` on a stream of its own; the GPU's memory is free again afterwards, whatever
    happened."""
    needed = rung.recipe.requires
    if needed and importlib.util.find_spec(needed) is None:
        return {"status": "absent", "reason": f"{needed} is not installed"}

    def on_side_stream() -> dict[str, Any]:
        with torch.cuda.stream(torch.cuda.Stream()):
            return time_iterations(rung, seconds)

    measured = attempt(on_side_stream)
    torch._dynamo.reset()
    attempt(
        release_memory
    )  # a broken GPU refuses this too, and the row that tells of it must still be written
    return measured


def measure_rows(
    gpu: str,
    rungs: list[Rung],
    budget: Budget,
    checks: list[Check],
    measure: Callable[[Rung, float], dict[str, Any]],
    save: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """One row per rung, each given its share of the seconds left. Saves every row.

    Rows that are past the budget, or of a recipe that a check is red for, say so.
    """
    rows: list[dict[str, Any]] = []
    for done, rung in enumerate(rungs):
        left = budget.left()
        share = left * rung.most_seconds / sum(later.most_seconds for later in rungs[done:])
        if red := against(rung.recipe, checks):
            measured = {"status": "red", "reason": f"wrong code has no speed: {red[0]}"}
        elif left > rung.least_seconds:
            measured = measure(rung, min(share, rung.most_seconds))
        else:
            measured = {
                "status": "left out",
                "reason": f"too little was left of the budget of {budget.seconds:g} s",
            }
        rows.append(make_row(gpu, rung, measured))
        print(f"{_row_line(rows[-1])}  ({budget.left():.0f} s left)", flush=True)
        save(rows)
    return rows


def run_checks(groups: list[tuple[str, Callable[[], list[Check]]]]) -> list[Check]:
    """Every group's checks; a group that raises is one red check."""
    checks: list[Check] = []
    for name, group in groups:
        started = time.monotonic()
        checks += guarded(name, group)
        attempt(release_memory)
        print(f"checked: {name} ({time.monotonic() - started:.0f} s)", flush=True)
    return checks


def summary(report: dict[str, Any]) -> str:
    """The report as text: environment, checks, kernels, profile, rows."""
    environment = report["environment"]
    lines = [
        f"{environment['gpu']}, torch {environment['torch']}, {report['date']}, {report['git_sha']}"
    ]
    lines += [f"ceiling {name}: {value}" for name, value in environment.get("ceilings", {}).items()]
    for check in report["correctness"]:
        verdict = "ok " if check["passed"] else "RED"
        error = "      nan" if check["error"] is None else f"{check['error']:9.2e}"
        lines.append(
            f"{verdict} {error} (budget {check['budget']:7.1e})  {check['check']}  {check['note']}"
        )
    lines += [kernel_speed.row_line(row) for row in report["kernels"]]
    lines += gpu_profile.lines(report["profile"]) if report["profile"] else []
    lines += [_row_line(row) for row in report["rows"]]
    return "\n".join(lines + report["notes"])


def _row_line(row: dict[str, Any]) -> str:
    name = f"{row['implementation']:32s} batch {row['batch']:3d}"
    if row["status"] != "measured":
        return f"{name}  {row['status']}: {row['reason']}"
    mfu = "  n/a" if row["mfu"] is None else f"{100 * row['mfu']:4.1f}%"
    clock = "?" if row["sm_clock_mhz"] is None else f"{row['sm_clock_mhz']:.0f}"
    power = "?" if row["power_w"] is None else f"{row['power_w']:.0f}"
    memory = f"{row['peak_memory_bytes'] / 2**30:5.1f} GiB"
    if row["predicted_memory_bytes"] is not None:
        memory += f" (estimate {row['predicted_memory_bytes'] / 2**30:.1f})"
    return (
        f"{name}  {row['samples_per_second']:7.1f} samples/s  {row['ms_per_sample']:6.2f} "
        f"ms/sample  MFU {mfu}  "
        f"{memory}  {clock} MHz  {power} W  "
        f"loss {row['loss_start']:.3f} -> {row['loss_end']:.3f}"
    )


def exit_code(report: dict[str, Any], parts: list[str]) -> int:
    """1 where a check is red or a measurement failed, else 0; running out of memory or time is a
    finding."""
    red = "correctness" in parts and not passed(report["correctness"])
    red = red or any(kernel_speed.is_bad(row) for row in report["kernels"])
    measured = [report["environment"].get("ceilings", {}), report["profile"], *report["rows"]]
    return int(red or any(values.get("status") == "failed" for values in measured))


def set_arithmetic(timing: bool) -> None:
    """TF32 off; convolutions by kernels that repeat themselves bit for bit, unless what is timed
    tunes them."""
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = not timing


def run_parts(
    report: dict[str, Any], options: argparse.Namespace, budget: Budget, save: Callable[[], None]
) -> None:
    """Fill the report part by part, saving after each part and row."""
    report["environment"] = describe()
    report["git_sha"] = report["environment"]["git_sha"] = options.git_sha or git_sha(REPOSITORY)
    if "environment" in options.parts:
        report["environment"]["ceilings"] = attempt(measure_ceilings)
        save()
    if "correctness" in options.parts:
        set_arithmetic(timing=False)
        report["correctness"] = run_checks(gpu_checks())
        save()
    if "kernels" in options.parts:
        measure_kernels(report, options, budget, save)
    if not TIMED_PARTS & set(options.parts):
        return
    if not passed(report["correctness"]):
        report["notes"].append("Not all was timed: a check is red, and wrong code has no speed.")
    set_arithmetic(timing=True)
    if "profile" in options.parts:
        report["profile"] = profile_fast(
            report["environment"]["gpu"], max(options.batches), report["correctness"]
        )
        save()
    if "throughput" in options.parts:
        measure_throughput(report, options, budget, save)


def profile_fast(gpu: str, batch: int, checks: list[Check]) -> dict[str, Any]:
    """One fast iteration by operator, measured and predicted; the status says why where there is
    none."""
    if red := against(FAST_BF16, checks):
        return {"status": "red", "reason": f"wrong code has no speed: {red[0]}"}
    ops = predictions(gpu, batch).get(FAST_BF16.way, {}).get("by_op", {})
    predicted = {op: figures["ms_per_sample"] * batch for op, figures in ops.items()}
    profile = attempt(partial(gpu_profile.measure_profile, FAST_BF16, batch, predicted))
    attempt(release_memory)
    return profile


def measure_throughput(
    report: dict[str, Any], options: argparse.Namespace, budget: Budget, save: Callable[[], None]
) -> None:
    """The rows, into the report."""

    def save_rows(rows: list[dict[str, Any]]) -> None:
        report["rows"] = rows
        save()

    rungs = plan_rungs(options.batches, options.rival_batch)
    measure_rows(
        report["environment"]["gpu"], rungs, budget, report["correctness"], measure_rung, save_rows
    )


def measure_kernels(
    report: dict[str, Any], options: argparse.Namespace, budget: Budget, save: Callable[[], None]
) -> None:
    """The heaviest call of every operator, into the report and into a file of its own that can be
    committed."""
    gpu = report["environment"]["gpu"]
    path = options.output / f"kernels_{re.sub('[^a-z0-9]+', '_', gpu.lower())}.json"
    about = {
        "environment": report["environment"],
        **{key: report[key] for key in ("command", "git_sha", "date")},
    }

    def save_rows(rows: list[dict[str, Any]]) -> None:
        report["kernels"] = rows
        write_json(path, {**about, "rows": rows})
        save()

    entries = kernel_speed.plan(kernel_speed.parse(["--quick"]), Target.here())
    seconds = max(0.0, min(budget.left(), KERNELS_SHARE * budget.seconds))
    kernel_speed.run(entries, Budget(seconds), kernel_speed.QUICK_SECONDS, save_rows)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line; leaves with exit code 2 where they make no sense."""
    parser = argparse.ArgumentParser(
        description="Correctness and speed of the fast and plain UNet."
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder that receives gpu_acceptance.json"
    )
    parser.add_argument("--batches", default="8,16,32,64", help="batch sizes (default: 8,16,32,64)")
    parser.add_argument(
        "--rival-batch",
        type=int,
        default=32,
        help="batch of what it is compared with (default: 32)",
    )
    parser.add_argument(
        "--parts", default=",".join(PARTS), help=f"parts to run (default: {','.join(PARTS)})"
    )
    parser.add_argument(
        "--git-sha", help="commit of this tree, where it lies without git (default: ask git)"
    )
    parser.add_argument(
        "--seconds", type=float, default=420.0, help="time to aim at, s (default: 420)"
    )
    options = parser.parse_args(arguments)
    try:
        options.batches = [int(batch) for batch in options.batches.split(",")]
    except ValueError:
        parser.error(
            f"--batches {options.batches}: give whole numbers with commas between them, such as "
            "8,16"
        )
    if min(*options.batches, options.rival_batch) < 1:
        parser.error("--batches, --rival-batch: every batch size must be at least 1")
    options.parts = options.parts.split(",")
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        parser.error(f"--parts: no part is called {unknown[0]!r}; choose from {', '.join(PARTS)}")
    timed_parts = sorted(TIMED_PARTS & set(options.parts))
    if timed_parts and "correctness" not in options.parts:
        parser.error(
            f"--parts: {timed_parts[-1]} needs correctness in the same run, since wrong code has "
            "no speed"
        )
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, print; returns the exit code."""
    options = parse(arguments)
    budget = Budget(options.seconds)
    if not torch.cuda.is_available():
        print(
            "gpu_acceptance.py measures a CUDA GPU, and torch finds none on this machine.",
            file=sys.stderr,
        )
        return 2
    options.output.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "environment": {},
        "correctness": [],
        "kernels": [],
        "profile": {},
        "rows": [],
        "notes": [],
        "command": shlex.join(["python", *sys.argv]),
        "git_sha": None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }

    def save() -> None:
        write_json(options.output / "gpu_acceptance.json", report)

    run_parts(report, options, budget, save)
    report["seconds"] = round(budget.seconds - budget.left(), 1)
    save()
    print(summary(report))
    return exit_code(report, options.parts)


if __name__ == "__main__":
    sys.exit(main())
