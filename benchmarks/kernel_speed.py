"""Every kernel on a GPU: first whether it is right there, then how fast.

    python -m benchmarks.kernel_speed [--ops geglu ...] [--cases TEXT]
                                      [--output benchmarks/results/kernels_h100.json]

Times the calls of one training step of the benchmark's UNet at full size: every backend of an op,
its reference in plain torch, and that reference under torch.compile. Forward and backward are rows
of their own; for convolutions and linear layers so are the two matmuls of the backward, dgrad and
wgrad. GB/s counts the bytes that must move, beside the copy bandwidth of the same run; TFLOP/s
counts matmuls.

A backend is timed only where its outputs and gradients, on this GPU and in this dtype, agree with
float64: on the op's small cases, and on the timed case made small enough.

Without an install: PYTHONPATH=kernels python -m benchmarks.kernel_speed, from the repository root.
Exit code 0: all is well; 1: a kernel of ours is wrong or failed; 2: it cannot run here.
`sd-perf doctor` reads the committed results to tell which kernels have run on hardware.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.attempts import attempt
from benchmarks.command import command_parser
from benchmarks.gpu_device import Device
from benchmarks.gpu_environment import describe, software
from benchmarks.kernel_cases import BATCH, COMPILED, Candidate, Direction, plan
from benchmarks.kernel_parity import UNCHECKED, ParityChecker
from benchmarks.kernel_timing import measure
from benchmarks.timing import Budget
from sd_kernels.conv.aten import tuned
from sd_kernels.registry import all_ops, source_digest
from sd_kernels.targets import GPUS, Target
from sd_perf.tools.results import KernelRow, Provenance, Result, write

SECONDS, QUICK_SECONDS = 0.3, 0.05
"""time of replays for each row, s"""

SaveRows = Callable[[list[KernelRow]], None]


def make_row(
    machine: dict[str, Any], candidate: Candidate, direction: Direction, measured: dict[str, Any]
) -> KernelRow:
    """A row of the result from the columns that are known of it.

    machine: the columns gpu, torch, triton and copy_gb_per_second.
    """
    return {
        "op": candidate.spec.name,
        "backend": candidate.backend,
        "case": candidate.case.name,
        "shape": dict(candidate.case.shape),
        "direction": direction,
        "batch": candidate.case.shape.get("B"),
        "dtype": str(candidate.dtype).removeprefix("torch."),
        "cached": "inputs in device memory, none of them in the L2 cache",
        "calls_per_step": candidate.case.calls,
        "bytes": candidate.moved_bytes(direction),
        "status": measured["status"],
        "reason": measured.get("reason"),
        "parity": measured.get("parity", UNCHECKED),
        "us": measured.get("us"),
        "gb_per_second": measured.get("gb_per_second"),
        "percent_of_copy": measured.get("percent_of_copy"),
        "tflop_per_second": measured.get("tflop_per_second"),
        "input_sets": measured.get("input_sets"),
        "graph_calls": measured.get("graph_calls"),
        "replays": measured.get("replays"),
        "gpu": machine["gpu"],
        "torch": machine["torch"],
        "triton": machine["triton"],
        "copy_gb_per_second": machine["copy_gb_per_second"],
        "source": source_digest(candidate.spec.name),
    }


def measure_all(
    candidates: list[Candidate],
    machine: dict[str, Any],
    budget: Budget,
    measure_candidate: Callable[[Candidate], dict[str, dict[str, Any]]],
    save: SaveRows,
) -> list[KernelRow]:
    """A row per candidate and direction, printed as it is made.

    A candidate that cannot run, or whose turn comes after the budget, says so in its rows. `save`
    gets all rows so far after every candidate.
    """
    rows: list[KernelRow] = []
    for candidate in candidates:
        if candidate.unavailable:
            outcome: dict[str, Any] = {"status": "absent", "reason": candidate.unavailable}
        elif budget.left() <= 0:
            reason = f"the budget of {budget.seconds:g} s was used up before it"
            outcome = {"status": "left out", "reason": reason}
        else:
            outcome = attempt(partial(measure_candidate, candidate))
        for direction in candidate.directions():
            measured = outcome.get(direction, outcome)
            rows.append(make_row(machine, candidate, direction, measured))
            print(row_line(rows[-1]), flush=True)
        save(rows)
    return rows


def row_line(row: KernelRow) -> str:
    """A row as one line of text."""
    name = f"{row['op']:16s} {row['direction']:8s} {row['case']:50s} {row['backend']:13s}"
    if row["status"] != "measured":
        return f"{name} {row['status']}: {row['reason']}"
    flops = f" {row['tflop_per_second']:.0f} TFLOP/s" if row["tflop_per_second"] else ""
    rates = f"{row['gb_per_second']:7.0f} GB/s {row['percent_of_copy']:4.0f} % of a copy{flops}"
    return f"{name} {row['us']:9.1f} us {rates}"


def step_lines(rows: list[KernelRow]) -> list[str]:
    """A line per op: milliseconds of the measured calls in a training step, fastest first.

    A backend is in it only where every row of its calls in a step is measured.
    """
    lines = []
    for op in dict.fromkeys(row["op"] for row in rows):
        times: dict[str, list[float | None]] = {}
        for row in rows:
            if row["op"] == op and row["calls_per_step"]:
                ms = None if row["us"] is None else row["us"] * row["calls_per_step"] / 1000
                times.setdefault(row["backend"], []).append(ms)
        totals = {
            backend: sum(ms for ms in each if ms is not None)
            for backend, each in times.items()
            if None not in each
        }
        fastest = sorted(totals, key=lambda backend: totals[backend])
        shown = ", ".join(f"{backend} {totals[backend]:.2f} ms" for backend in fastest)
        lines.append(f"{op}, these calls of one training step: {shown or 'nothing measured'}")
    return lines


def is_bad(row: KernelRow) -> bool:
    """Whether a row makes the run fail. The code that torch.compile generates is not ours."""
    return row["status"] in ("red", "failed") and row["backend"] != COMPILED


def run(
    candidates: list[Candidate],
    budget: Budget,
    seconds: float,
    save: SaveRows,
    *,
    device: Device,
    checker: ParityChecker,
    copy_rate: float,
    algorithms: int = 0,
) -> list[KernelRow]:
    """All rows, measured on the device with about `seconds` of replays each.

    copy_rate: the device's, bytes per second. algorithms: how many of cuDNN's are timed for each
    convolution; 0: all.
    """
    versions, l2_bytes = software(), device.l2_bytes()
    machine = {
        "gpu": device.gpu(),
        "torch": versions["torch"],
        "triton": versions["triton"],
        "copy_gb_per_second": copy_rate / 1e9,
    }

    def measure_candidate(candidate: Candidate) -> dict[str, dict[str, Any]]:
        torch._dynamo.reset()
        # Buffers donated to a compiled backward would be gone at its second call.
        with torch._functorch.config.patch(donated_buffer=False):
            return measure(
                candidate,
                checker,
                copy_rate=copy_rate,
                l2_bytes=l2_bytes,
                seconds=seconds,
                device=device,
            )

    with tuned(algorithms):  # all convolutions alike, torch's own too
        return measure_all(
            candidates, machine, budget, measure_candidate=measure_candidate, save=save
        )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line; SystemExit with code 2 where one makes no sense."""
    parser = command_parser("kernel_speed", __doc__)
    add = parser.add_argument
    ops = list(all_ops())
    names = f"default: all of {', '.join(ops)}"
    add("--ops", nargs="+", metavar="OP", choices=ops, default=ops, help=names)
    add("--cases", default="", help="only cases whose name contains this")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--batch", type=int, default=BATCH, help=f"samples (default: {BATCH})")
    add("--output", type=Path, help="JSON file of all rows")
    add("--quick", action="store_true", help="the heaviest case of each op, fewest replays")
    add("--dry", action="store_true", help="list the calls (without a GPU: of an H100)")
    add("--seconds", type=float, default=1500.0, help="time to aim at, s (default: 1500)")
    add("--git-sha", help="commit of this tree, where it lies without git (default: ask git)")
    options = parser.parse_args(arguments)
    if options.batch < 1:
        parser.error(f"--batch {options.batch}: must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, print; returns the exit code."""
    options = parse(arguments)
    has_gpu = torch.cuda.is_available()
    candidates = plan(
        Target.here() if has_gpu else GPUS["h100"].target,
        ops=options.ops,
        case_filter=options.cases,
        dtype=getattr(torch, options.dtype),
        batch=options.batch,
        heaviest_only=options.quick,
    )
    if not candidates:
        names = f"{', '.join(options.ops)} in {options.dtype}"
        print(f"no case of {names} contains {options.cases!r}", file=sys.stderr)
        return 2
    if options.dry:
        print("\n".join(map(plan_line, candidates)))
        return 0
    if not has_gpu:
        words = (
            "kernel_speed.py measures a CUDA GPU, and torch finds none here (--dry lists cases)."
        )
        print(words, file=sys.stderr)
        return 2
    provenance = Provenance.of_this_run("kernel_speed", describe(), software(), options.git_sha)

    def save(rows: list[KernelRow]) -> None:
        if options.output:
            write(options.output, Result("kernel_speed", provenance, rows))

    seconds = QUICK_SECONDS if options.quick else SECONDS
    device = Device()
    copy_rate = device.copy_rate()
    print(f"{device.gpu()}, copy {copy_rate / 1e9:.0f} GB/s", flush=True)
    rows = run(
        candidates,
        Budget(options.seconds),
        seconds=seconds,
        save=save,
        device=device,
        checker=ParityChecker("cuda"),
        copy_rate=copy_rate,
    )
    print("\n".join(step_lines(rows)))
    return int(any(map(is_bad, rows)))


def plan_line(candidate: Candidate) -> str:
    """A candidate as one line of text: the bytes that its calls must move, or why it cannot run."""
    moved = " and ".join(
        f"{candidate.moved_bytes(direction) / 1e6:.0f} MB {direction}"
        for direction in candidate.directions()
    )
    name = f"{candidate.spec.name:16s} {candidate.case.name:50s} {candidate.backend:13s}"
    return f"{name} {candidate.unavailable or moved}"


if __name__ == "__main__":
    sys.exit(main())
