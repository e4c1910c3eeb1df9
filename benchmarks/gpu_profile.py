"""Time of a fast iteration by operator, beside the least time by `sd-perf estimate`.

A kernel is counted for the operator that launched it, whatever its name. In the forward pass that
is the operator in whose marked range, or custom operator `sd_kernels::<op>...`, it was launched. In
the backward pass it is the operator whose range made the autograd node; both have the same sequence
number. The rest are torch's own sums, copies and casts: `elementwise`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, Protocol

import torch

from benchmarks.gpu_device import Device
from benchmarks.gpu_fast import FastRecipe, FastWorkload
from benchmarks.gpu_throughput import ALGORITHMS
from sd_kernels.conv.aten import tuned
from sd_kernels.registry import all_ops
from sd_perf.fast.ops import Op

RANGE = "sd_perf op "
"""the names of marked ranges are this and the operator"""
REST = "elementwise"
"""the estimate's row for kernels of no operator of sd_kernels"""
ENGINE = "autograd::engine::"
"""the names of the profiler's events around backward nodes begin with this"""
BACKWARD_NODE = 1
"""scope of an autograd node's event (ATen/record_function.h)"""
WARM_UP_ITERATIONS = 2
MOST_KERNELS = 4
"""kernels of an operator that are listed by name, the longest first"""

Times = list[tuple[str, float]]
"""kernels and their microseconds"""


class Event(Protocol):
    """The part of torch.autograd.profiler_util.FunctionEvent that is read here."""

    name: str
    scope: int
    sequence_nr: int
    cpu_parent: Any
    time_range: Any


def marked(name: str, op: Op) -> Op:
    """The operator in a range of its name, for the profiler."""

    @wraps(op)
    def call(*arguments: Any, **options: Any) -> Any:
        with torch.profiler.record_function(RANGE + name):
            return op(*arguments, **options)

    return call


def device_times(event: Any) -> Times:
    """Kernels that the event itself launched.

    The profiler also lists marked ranges on the GPU's time line; these are no kernels.
    """
    return [
        (kernel.name, kernel.duration)
        for kernel in event.kernels
        if not kernel.name.startswith(RANGE)
    ]


def host_times(event: Any) -> Times:
    """The time that one of torch's operators spent on the CPU, as if it were a kernel."""
    is_operator = event.name.startswith("aten::")
    return [(event.name, event.self_cpu_time_total)] if is_operator else []


def by_op(
    events: Iterable[Event], times: Callable[[Any], Times] = device_times
) -> dict[str, dict[str, Any]]:
    """Milliseconds, number of kernels and longest kernels by operator, the longest first."""
    events = sorted(events, key=lambda event: event.time_range.start)
    made_by: dict[int, str] = {}
    for event in events:
        # An autograd node has the sequence number of the forward events around its making; the last
        # of them, in order of time, made it.
        if event.sequence_nr >= 0 and not any(
            around.name.startswith(ENGINE) for around in _ancestors(event)
        ):
            made_by[event.sequence_nr] = _named(event) or REST
    spent: dict[str, Counter[str]] = {}
    counts: Counter[str] = Counter()
    for event in events:
        for kernel, microseconds in times(event):
            op = _operator(event, made_by)
            spent.setdefault(op, Counter())[kernel] += microseconds  # type: ignore[assignment]
            counts[op] += 1
    rows: dict[str, dict[str, Any]] = {
        op: {
            "ms": sum(kernels.values()) / 1000,
            "kernels": counts[op],
            "longest": {
                name: spent_us / 1000 for name, spent_us in kernels.most_common(MOST_KERNELS)
            },
        }
        for op, kernels in spent.items()
    }
    return dict(sorted(rows.items(), key=lambda row: -row[1]["ms"]))


def _ancestors(event: Any) -> Iterable[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _named(event: Event) -> str | None:
    """The operator of the innermost range or custom operator around an event, itself included."""
    for around in _ancestors(event):
        if around.name.startswith(RANGE):
            return around.name.removeprefix(RANGE)
        own = around.name.removeprefix("sd_kernels::")
        found = [op for op in all_ops() if own != around.name and own.startswith(op)]
        if found:
            return max(found, key=len)
    return None


def _operator(event: Event, made_by: Mapping[int, str]) -> str:
    named = _named(event)
    if named:
        return named
    for around in _ancestors(event):
        if around.scope == BACKWARD_NODE and around.sequence_nr >= 0:
            return made_by.get(around.sequence_nr, REST)
    return REST


def compare(
    measured: Mapping[str, Mapping[str, Any]], predicted: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A row per operator, the largest gap first; milliseconds of one iteration."""
    rows = []
    for op in dict.fromkeys([*measured, *predicted]):
        own: Mapping[str, Any] = measured.get(op, {"ms": 0.0, "kernels": 0, "longest": {}})
        floor = predicted.get(op)
        row = {
            "op": op,
            "measured_ms": own["ms"],
            "predicted_ms": floor,
            "gap_ms": own["ms"] - (floor or 0.0),
        }
        row["ratio"] = own["ms"] / floor if floor else None
        rows.append(row | {"kernels": own["kernels"], "longest": own["longest"]})
    return sorted(rows, key=lambda row: -row["gap_ms"])


def profile(recipe: FastRecipe, batch: int, device: Device) -> list[Any]:
    """Profiler events of one eager iteration of the full-size network after a warm-up.

    The replay of a graph has the same kernels, but no ranges to count them by. On a GPU the current
    stream must be a side stream.
    """
    config, latents = device.full
    workload = FastWorkload(recipe, config, batch, device.name, wrap=marked, latent_size=latents)
    with tuned(ALGORITHMS):
        for _ in range(WARM_UP_ITERATIONS):
            workload.iteration()
    activities = [torch.profiler.ProfilerActivity.CPU]
    is_gpu = device.name == "cuda"
    if is_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        workload.iteration()
        if is_gpu:
            torch.cuda.synchronize()
    return list(profiler.events() or ())


def measure_profile(
    recipe: FastRecipe, batch: int, predicted: Mapping[str, float], device: Device
) -> dict[str, Any]:
    """The table of one full-size iteration; `predicted` has milliseconds by operator.

    In a rehearsal, where no kernels are traced, torch's operators on the CPU stand for them.
    """
    with device.side_stream():
        events = profile(recipe, batch, device)
    measured = by_op(events, device_times if device.name == "cuda" else host_times)
    if not measured:
        raise RuntimeError("the profiler saw no kernel; CUPTI must be allowed to trace")
    rows = compare(measured, predicted)
    return {"status": "measured", "recipe": recipe.implementation, "batch": batch, "ops": rows}


def lines(table: Mapping[str, Any]) -> list[str]:
    """The table for people."""
    if table["status"] != "measured":
        return [f"profile: {table['status']}: {table['reason']}"]
    shown = [
        f"one iteration of {table['recipe']} at batch {table['batch']}, ms of kernels, largest "
        "gap first"
    ]
    shown.append(f"{'op':18s} measured  predicted  ratio  gap      kernels")
    for row in table["ops"]:
        floor = (
            "         -      -"
            if row["ratio"] is None
            else f"{row['predicted_ms']:10.2f} {row['ratio']:6.2f}"
        )
        shown.append(
            f"{row['op']:18s} {row['measured_ms']:8.2f} {floor} {row['gap_ms']:+8.2f} "
            f"{row['kernels']:5d}"
        )
    measured, predicted = (
        sum(row[key] or 0.0 for row in table["ops"]) for key in ("measured_ms", "predicted_ms")
    )
    ratio = f"{measured / predicted:6.2f}" if predicted else "     -"
    return [
        *shown,
        f"{'sum':18s} {measured:8.2f} {predicted:10.2f} {ratio} {measured - predicted:+8.2f}",
    ]
