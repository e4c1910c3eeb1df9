"""Every kernel, forward and backward: `kernel_speed` on a GPU, small calls of it on a CPU.

    python -m benchmarks.kernels [--ops geglu ...] [--output benchmarks/results/kernels_h100.json]
    python -m benchmarks.kernels --tiny

Options and rows are those of `python -m benchmarks.kernel_speed`. With --tiny the op's smallest
call is timed by the backends that run on this machine's CPU: it shows that every op and its
backward can be called, and no speed that matters.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from benchmarks import kernel_speed
from benchmarks.command import Report, run_command
from benchmarks.kernel_cases import Candidate
from benchmarks.kernel_parity import ParityChecker
from benchmarks.kernel_timing import backwards, forwards, input_sets
from benchmarks.timing import Budget, WallClock, timed
from sd_kernels.registry import all_ops
from sd_kernels.selection import reasons_against
from sd_kernels.targets import Target
from sd_perf.tools.results import KernelRow

NAME = "kernels"
CALLS = 3
COPY_NUMBERS = 2**22


def small_candidates(ops: Sequence[str]) -> list[Candidate]:
    """The smallest call of each op by every backend, those that cannot run here included."""
    candidates = []
    for spec in (all_ops()[name] for name in ops or all_ops()):
        dtype = spec.dtypes[-1]
        case = min(spec.small_cases, key=lambda case: spec.work(case, dtype).forward_bytes)
        for backend in spec.backends:
            reasons = reasons_against(backend, Target("cpu", "cpu"), [case], dtype)
            why = "; ".join(map(str, reasons))
            candidates.append(Candidate(spec, case, backend.name, dtype, unavailable=why))
    return candidates


def measure_on_cpu(
    candidate: Candidate, checker: ParityChecker, copied: float
) -> dict[str, dict[str, Any]]:
    """Columns of a `KernelRow` by direction, from calls one by one on the CPU.

    `copied` is the rate of a copy, bytes per second.
    """
    function, parity = candidate.function(), checker.check(candidate, candidate.function())
    sets = input_sets(candidate, l2_bytes=1, device="cpu")
    measured: dict[str, dict[str, Any]] = {}
    for direction in candidate.directions():
        forward = direction == "forward"
        calls = forwards(function, sets) if forward else backwards(function, sets, direction)
        calls[0]()
        us = 1000 * statistics.median(timed(calls[0], CALLS, WallClock()))
        rate = candidate.moved_bytes(direction) / us * 1e6
        measured[direction] = {
            "status": "measured",
            "parity": parity,
            "us": us,
            "gb_per_second": rate / 1e9,
            "percent_of_copy": 100 * rate / copied,
            "tflop_per_second": candidate.flops(direction) / us / 1e6,
            "input_sets": len(sets),
        }
    return measured


def copy_rate() -> float:
    """Bytes per second, read and written both counted, of a copy in the CPU's memory."""
    source = torch.randn(COPY_NUMBERS)
    target = torch.empty_like(source)
    seconds = statistics.median(timed(partial(target.copy_, source), CALLS, WallClock())) / 1000
    return 2 * source.numel() * source.element_size() / seconds


def measure(options: argparse.Namespace) -> int:
    """The tiny form; returns the exit code, 1 where a kernel is red."""
    device = torch.device("cpu")
    report = Report(NAME, options, device, ("op", "direction", "backend"))
    source = report.result.provenance
    copied = copy_rate()
    machine = {
        "gpu": f"none: {source.machine['cpu']}",
        "torch": source.versions["torch"],
        "triton": source.versions["triton"],
        "copy_gb_per_second": copied / 1e9,
    }
    checker = ParityChecker("cpu")
    rows = kernel_speed.measure_all(
        small_candidates(options.ops),
        machine,
        Budget(options.seconds),
        measure_candidate=partial(measure_on_cpu, checker=checker, copied=copied),
        save=lambda rows: None,
    )
    report.extend([with_cpu_cache(row) for row in rows])
    return int(any(map(kernel_speed.is_bad, rows)))


def with_cpu_cache(row: KernelRow) -> KernelRow:
    """The row, which says of its inputs what is true on a CPU."""
    return {**row, "cached": "inputs, in the CPU's caches too"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the tiny form."""
    add = parser.add_argument
    add("--ops", nargs="+", default=[], choices=list(all_ops()), metavar="OP", help="default: all")
    add("--seconds", type=float, default=60.0, help="time to aim at, s (default: 60)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if "--tiny" not in given:
        return kernel_speed.main(given)
    return run_command(NAME, __doc__, add_options, measure, given)


if __name__ == "__main__":
    sys.exit(main())
