"""Every operator on a GPU: first whether it is right there, then how fast, beside plain torch and
torch.compile.

    python -m benchmarks.kernel_speed [--ops geglu ...] [--cases TEXT] [--output
    benchmarks/results/kernels_h100.json]

Times the calls of one training step at full size, forward and backward (of 16-bit layers with
weights, the gradients of input and of parameters apart), in CUDA graphs that rotate through inputs
larger than the L2 cache. GB/s counts bytes that must move (the spec's), beside the copy bandwidth
of the same run; TFLOP/s counts what matrices compute. A backend is timed only where its parity with
float64, on this GPU and in this dtype, is green: on the op's small cases and on the timed case
itself, made small enough. Exit code 0: all is well; 1: something of ours is red or failed; 2: it
cannot run here. `sd-perf doctor` reads committed results to tell what has run on hardware.

Not called kernels.py: scripts of this folder can be imported, and other libraries look for a
package of that name.
"""

from __future__ import annotations

import argparse
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.attempts import attempt, release_memory
from benchmarks.gpu_environment import describe, git_sha, measure_copy
from benchmarks.timing import Budget, CudaClock, repetitions, timed
from sd_kernels import harness
from sd_kernels.conv.aten import tuned
from sd_kernels.registry import all_ops, source_digest
from sd_kernels.sd_v2_shapes import BATCH
from sd_kernels.selection import reasons_against
from sd_kernels.spec import Case, Function, Inputs, OpSpec
from sd_kernels.targets import GPUS, Target
from sd_perf.files import write_json

REPOSITORY = Path(__file__).resolve().parents[1]
COMPILED = "torch.compile"
PRODUCTS = ("conv", "linear", "skip_conv", "upsample_conv")
"""ops whose backward is two products: dgrad, the gradient of the input, and wgrad, that of the
weight and the bias"""
PARAMETERS = ("weight", "bias")
PARITY_BYTES = 2**28
"""of a timed case where it is held to float64, whose tensors are several times as large"""
GRAPH_SECONDS = 5e-4
"""least duration of a graph, so that what lies between two replays does not count"""
SECONDS, QUICK_SECONDS = 0.3, 0.05
"""of replays for each row"""
MOST_SETS = 32
MEASURED_KEYS = (
    "us",
    "gb_per_second",
    "percent_of_copy",
    "tflop_per_second",
    "input_sets",
    "graph_calls",
    "replays",
)
UNCHECKED = {"ok": False, "checked": 0, "worst": ""}


@dataclass(frozen=True)
class Entry:
    """One implementation of one call; forward and backward, or the two products of the latter, are
    a row each."""

    spec: OpSpec
    case: Case
    backend: str
    dtype: torch.dtype
    against: str = ""
    """why it cannot run here, or an empty string"""

    def function(self) -> Function:
        """The implementation."""
        if self.backend == COMPILED:
            return torch.compile(self.spec.reference(), dynamic=False)
        return self.spec.backend(self.backend).function(self.spec.name)

    def work(self, direction: str) -> float:
        """Bytes that must move. Each product reads two of input, weight and output, and makes the
        third."""
        work = self.spec.work(self.case, self.dtype)
        return work.backward_bytes if direction == "backward" else work.forward_bytes

    def flops(self, direction: str) -> float:
        """Floating-point operations of matrices; the three products of a layer have as many
        each."""
        work = self.spec.work(self.case, self.dtype)
        return work.backward_flops or 2 * work.flops if direction == "backward" else work.flops

    def directions(self) -> list[str]:
        """Those that the op has."""
        if self.spec.name in PRODUCTS:
            return ["forward", "dgrad", "wgrad"]
        return ["forward", "backward"] if self.work("backward") else ["forward"]


def plan(options: argparse.Namespace, target: Target) -> list[Entry]:
    """What there is to measure, in order; backends that cannot run are in it, with the reasons."""
    dtype = getattr(torch, options.dtype)
    return [
        entry
        for name in options.ops
        if dtype in all_ops()[name].dtypes
        for case in _cases(all_ops()[name], options, dtype)
        for entry in _entries(all_ops()[name], case, dtype, target)
    ]


def _cases(spec: OpSpec, options: argparse.Namespace, dtype: torch.dtype) -> list[Case]:
    cases = [case for case in spec.cases if options.cases in case.name]
    if options.quick and cases:
        cases = [max(cases, key=lambda case: case.calls * spec.work(case, dtype).forward_bytes)]
    return [case.at_batch(options.batch) if "B" in case.shape else case for case in cases]


def _entries(spec: OpSpec, case: Case, dtype: torch.dtype, target: Target) -> Iterator[Entry]:
    for backend in spec.backends:
        yield Entry(
            spec,
            case,
            backend.name,
            dtype,
            "; ".join(map(str, reasons_against(backend, target, [case], dtype))),
        )
    yield Entry(spec, case, COMPILED, dtype)


def reduced(spec: OpSpec, case: Case, dtype: torch.dtype) -> Case:
    """The case with fewer samples, or where it has none to spare the largest size halved, until it
    fits float64."""
    shape = dict(case.shape)
    while spec.work(replace(case, shape=shape), dtype).forward_bytes > PARITY_BYTES:
        letter = "B" if shape.get("B", 1) > 1 else max(shape, key=lambda size: shape[size])
        shape[letter] //= 2
    return replace(case, shape=shape)


class Parity:
    """Verdicts of the harness on the device, small cases once for each backend."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._of_small_cases: dict[tuple[str, str], list[harness.Verdict]] = {}

    def of(self, entry: Entry, function: Function) -> dict[str, Any]:
        """Whether everything is green, how many verdicts there are, and the worst."""
        if entry.backend == "reference":
            return {"ok": True, "checked": 0, "worst": "the others are held to it"}
        cases = [reduced(entry.spec, entry.case, entry.dtype)]
        verdicts = [*self._small(entry), *self._verdicts(entry, cases, function)]
        worst = max(verdicts, key=_badness)
        return {
            "ok": all(verdict.ok for verdict in verdicts),
            "checked": len(verdicts),
            "worst": str(worst),
        }

    def _small(self, entry: Entry) -> list[harness.Verdict]:
        if entry.backend == COMPILED:
            return []  # one compilation a case, of code that is not ours
        key = entry.spec.name, entry.backend
        if key not in self._of_small_cases:
            refuses = entry.spec.backend(entry.backend).refuses
            cases = [case for case in entry.spec.small_cases if not refuses(case, entry.dtype)]
            self._of_small_cases[key] = self._verdicts(entry, cases, None)
        return self._of_small_cases[key]

    def _verdicts(
        self, entry: Entry, cases: list[Case], function: Function | None
    ) -> list[harness.Verdict]:
        backend = "reference" if entry.backend == COMPILED else entry.backend
        checks = (
            harness.check(entry.spec, backend, case, entry.dtype, self.device, 0, function)
            for case in cases
        )
        return [verdict for verdicts in checks for verdict in verdicts]


def _badness(verdict: harness.Verdict) -> float:
    ratio = verdict.error / max(verdict.budget, 1e-30)
    return math.inf if math.isnan(ratio) else ratio


def input_sets(entry: Entry, l2_bytes: int, device: str) -> list[dict[str, Any]]:
    """Inputs, as many sets of them as twice the L2 cache takes, so that no call finds its own
    there."""
    make = [entry.spec.inputs(entry.case, Inputs(entry.case, entry.dtype, device))]
    size = sum(
        value.numel() * value.element_size()
        for value in make[0].values()
        if isinstance(value, torch.Tensor)
    )
    count = min(MOST_SETS, -(-2 * l2_bytes // size))
    return make + [
        entry.spec.inputs(entry.case, Inputs(entry.case, entry.dtype, device, i))
        for i in range(1, count)
    ]


def forwards(function: Function, sets: list[dict[str, Any]]) -> list[Callable[[], Any]]:
    """A call for each set of inputs."""
    return [partial(function, **inputs) for inputs in sets]


def _wanted(direction: str, name: str) -> bool:
    return direction == "backward" or (direction == "wgrad") == (name in PARAMETERS)


def backwards(
    function: Function, sets: list[dict[str, Any]], direction: str = "backward"
) -> list[Callable[[], Any]]:
    """The backward of a call for each set of inputs; the forwards run now, and keep what they
    saved.

    What the direction does not ask for takes no gradient at all: it is by that that an op of ours
    leaves it out.
    """
    calls: list[Callable[[], Any]] = []
    for given in sets:
        inputs = {
            name: value.detach()
            if isinstance(value, torch.Tensor) and not _wanted(direction, name)
            else value
            for name, value in given.items()
        }
        results = function(**inputs)
        outputs = [
            out
            for out in (results if isinstance(results, tuple) else (results,))
            if out.requires_grad
        ]
        leaves = [
            value
            for value in inputs.values()
            if isinstance(value, torch.Tensor) and value.requires_grad
        ]
        grads = [torch.randn_like(out) for out in outputs]
        calls.append(
            partial(
                torch.autograd.grad, outputs, leaves, grads, retain_graph=True, allow_unused=True
            )
        )
    return calls


def capture(calls: list[Callable[[], Any]], count: int) -> Callable[[], None]:
    """`count` of the calls, in turns, as one CUDA graph on the current stream; gives what replays
    it."""
    for call in calls[:1] * 3:
        call()  # compiles, loads, and creates what libraries keep
    graph = torch.cuda.CUDAGraph()
    kept: dict[int, Any] = {}  # outputs in memory of their own, as many as there are inputs
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for number, call in enumerate(islice(cycle(calls), count)):
            kept[number % len(calls)] = call()
    return graph.replay


def time_direction(
    entry: Entry, direction: str, calls: list[Callable[[], Any]], copy: float, seconds: float
) -> dict:
    """Microseconds of a call and what follows from them, in about so many seconds of replays."""
    moved = entry.work(direction)
    count = len(calls) * max(1, math.ceil(GRAPH_SECONDS * copy / (moved * len(calls))))
    replay = capture(calls, count)
    once = statistics.median(timed(replay, 3, CudaClock())) / 1000
    replays = repetitions(seconds, once, least=5, most=500)
    us = 1000 * statistics.median(timed(replay, replays, CudaClock())) / count
    rate = moved / us * 1e6
    values = (
        us,
        rate / 1e9,
        100 * rate / copy,
        entry.flops(direction) / us / 1e6,
        len(calls),
        count,
        replays,
    )
    return {"status": "measured", **dict(zip(MEASURED_KEYS, values, strict=True))}


def measure(
    entry: Entry, parity: Parity, copy: float, l2_bytes: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """What is known of each direction: its parity, and its speed where that is green. Runs on a
    stream of its own."""
    function, device = entry.function(), parity.device
    verdict = parity.of(entry, function)
    if not verdict["ok"]:
        return {
            way: {"status": "red", "reason": verdict["worst"], "parity": verdict}
            for way in entry.directions()
        }

    def timed_on_side_stream(way: str) -> dict[str, Any]:
        with torch.cuda.stream(torch.cuda.Stream()):
            sets = input_sets(entry, l2_bytes, device)
            calls = forwards(function, sets) if way == "forward" else backwards(function, sets, way)
            return time_direction(entry, way, calls, copy, seconds)

    measured = {}
    for way in entry.directions():
        measured[way] = {"parity": verdict, **attempt(partial(timed_on_side_stream, way))}
        attempt(release_memory)
    return measured


def make_row(
    machine: dict[str, Any], entry: Entry, direction: str, measured: dict[str, Any]
) -> dict[str, Any]:
    """A row of the report: what was run, every measured key (None where it is missing), and why if
    it is."""
    row = {
        "op": entry.spec.name,
        "backend": entry.backend,
        "case": entry.case.name,
        "shape": dict(entry.case.shape),
        "direction": direction,
        "dtype": str(entry.dtype).removeprefix("torch."),
        "calls_per_step": entry.case.calls,
        "bytes": entry.work(direction),
        "status": measured["status"],
        "reason": measured.get("reason"),
        "parity": measured.get("parity", UNCHECKED),
    }
    row |= {key: measured.get(key) for key in MEASURED_KEYS}
    return row | machine | {"source": source_digest(entry.spec.name)}


def measure_all(
    entries: list[Entry],
    machine: dict[str, Any],
    budget: Budget,
    measure_entry: Callable[[Entry], dict[str, dict[str, Any]]],
    save: Callable[[list[dict[str, Any]]], None],
) -> list[dict[str, Any]]:
    """A row per entry and direction; what cannot run and what is past the budget say so. Saves
    after every entry."""
    rows: list[dict[str, Any]] = []
    for entry in entries:
        if entry.against:
            outcome: dict[str, Any] = {"status": "absent", "reason": entry.against}
        elif budget.left() <= 0:
            outcome = {
                "status": "left out",
                "reason": f"the budget of {budget.seconds:g} s was used up before it",
            }
        else:
            outcome = attempt(partial(measure_entry, entry))
        for direction in entry.directions():
            rows.append(make_row(machine, entry, direction, outcome.get(direction, outcome)))
            print(row_line(rows[-1]), flush=True)
        save(rows)
    return rows


def row_line(row: dict[str, Any]) -> str:
    """A row for people."""
    name = f"{row['op']:16s} {row['direction']:8s} {row['case']:50s} {row['backend']:13s}"
    if row["status"] != "measured":
        return f"{name} {row['status']}: {row['reason']}"
    flops = f" {row['tflop_per_second']:.0f} TFLOP/s" if row["tflop_per_second"] else ""
    rates = f"{row['gb_per_second']:7.0f} GB/s {row['percent_of_copy']:4.0f} % of a copy{flops}"
    return f"{name} {row['us']:9.1f} us {rates}"


def step_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Per op: milliseconds of its calls in one training step, of each backend for which all of them
    are measured."""
    lines = []
    for op in dict.fromkeys(row["op"] for row in rows):
        in_step = [row for row in rows if row["op"] == op and row["calls_per_step"]]
        totals = {}
        for backend in dict.fromkeys(row["backend"] for row in in_step):
            times = [
                (row["us"], row["calls_per_step"]) for row in in_step if row["backend"] == backend
            ]
            if all(us is not None for us, _ in times):
                totals[backend] = sum(us * calls for us, calls in times) / 1000
        shown = ", ".join(
            f"{backend} {total:.2f} ms"
            for backend, total in sorted(totals.items(), key=lambda t: t[1])
        )
        lines.append(f"{op}, these calls of one training step: {shown or 'nothing measured'}")
    return lines


def is_bad(row: dict[str, Any]) -> bool:
    """Whether a row makes the run fail. What torch.compile makes of our reference is not ours to
    mend."""
    return row["status"] in ("red", "failed") and row["backend"] != COMPILED


def run(
    entries: list[Entry], budget: Budget, seconds: float, save: Callable[[list[dict]], None]
) -> list[dict]:
    """All rows, measured on GPU 0."""
    properties = torch.cuda.get_device_properties(0)
    environment = describe()
    machine = {
        "gpu": properties.name,
        "torch": environment["torch"],
        "triton": environment["triton"],
    }
    copy, parity = measure_copy(), Parity("cuda")
    l2_bytes = properties.L2_cache_size
    print(
        f"{properties.name}, copy {copy / 1e9:.0f} GB/s, L2 {l2_bytes / 2**20:.0f} MiB", flush=True
    )

    def measure_entry(entry: Entry) -> dict[str, dict[str, Any]]:
        torch._dynamo.reset()
        # Buffers donated to a compiled backward would be gone at its second call.
        with torch._functorch.config.patch(donated_buffer=False):
            return measure(entry, parity, copy, l2_bytes, seconds)

    with tuned():  # every convolution alike: torch's, too
        return measure_all(
            entries, {**machine, "copy_gb_per_second": copy / 1e9}, budget, measure_entry, save
        )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--ops", nargs="+", choices=list(all_ops()), default=list(all_ops()), help="default: all"
    )
    parser.add_argument("--cases", default="", help="only cases whose name contains this")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--batch", type=int, default=BATCH, help=f"samples (default: {BATCH})")
    parser.add_argument("--output", type=Path, help="JSON file of all rows")
    parser.add_argument(
        "--quick", action="store_true", help="the heaviest case of each op, fewest replays"
    )
    parser.add_argument(
        "--dry", action="store_true", help="list what would be measured (without a GPU: on an H100)"
    )
    parser.add_argument(
        "--seconds", type=float, default=1500.0, help="time to aim at, s (default: 1500)"
    )
    parser.add_argument(
        "--git-sha", help="commit of this tree, where it lies without git (default: ask git)"
    )
    options = parser.parse_args(arguments)
    if options.batch < 1:
        parser.error(f"--batch {options.batch}: must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, write, print; returns the exit code."""
    options = parse(arguments)
    has_gpu = torch.cuda.is_available()
    entries = plan(options, Target.here() if has_gpu else GPUS["h100"].target)
    if not entries:
        print(
            f"no case of {', '.join(options.ops)} in {options.dtype} contains {options.cases!r}",
            file=sys.stderr,
        )
        return 2
    if options.dry:
        for entry in entries:
            calls = " and ".join(
                f"{entry.work(way) / 1e6:.0f} MB {way}" for way in entry.directions()
            )
            print(
                f"{entry.spec.name:16s} {entry.case.name:50s} {entry.backend:13s} "
                f"{entry.against or calls}"
            )
        return 0
    if not has_gpu:
        print(
            "kernel_speed.py measures a CUDA GPU, and torch finds none here (--dry lists cases).",
            file=sys.stderr,
        )
        return 2
    report: dict[str, Any] = {
        "environment": describe(),
        "command": shlex.join(["python", *sys.argv]),
        "git_sha": options.git_sha or git_sha(REPOSITORY),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }

    def save(rows: list[dict[str, Any]]) -> None:
        if options.output:
            write_json(options.output, {**report, "rows": rows})

    rows = run(entries, Budget(options.seconds), QUICK_SECONDS if options.quick else SECONDS, save)
    print("\n".join(step_lines(rows)))
    return int(any(is_bad(row) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
