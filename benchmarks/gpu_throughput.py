"""Throughput of whole training iterations on a GPU: the fast UNet's and its rivals'."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch

from benchmarks.attempts import attempt, release_memory
from benchmarks.gpu_device import Device
from benchmarks.gpu_fast import FAST_BF16, FAST_FP8
from benchmarks.gpu_workload import (
    AUTOCAST,
    COMPILED,
    DIFFUSERS,
    DIFFUSERS_COMPILED,
    MASTERS,
    Recipe,
)
from benchmarks.timing import Budget, rates, repetitions, timed
from sd_kernels.conv.aten import tuned
from sd_kernels.targets import key_of_driver, peak_of_driver
from sd_perf.config import Config
from sd_perf.tools.estimate.predict import predict
from sd_perf.tools.results import Conditions, Status

TIMED_SECONDS, EAGER_SECONDS = 15.0, 5.0
"""longest time that iterations are timed, in a graph and eager; clocks have settled by then"""
START_SECONDS = 25.0
"""time that building, warm-up and capture take at most"""
COMPILE_SECONDS = 70.0
"""time that torch.compile of a full-size network takes; it is not begun with less left"""
FLOPS_PER_SAMPLE = 2.409e12
"""FLOPs that the MFU counts: forward and backward of one sample of the benchmark's UNet"""
ALGORITHMS = 10
"""how many of cuDNN's algorithms are timed for each convolution in warm-up, as the trainer does;
all take minutes"""
WARM_UP_ITERATIONS = 3
"""kernels, plans and gradients exist after the first. The 11 that torch's documentation asks for
before a capture are for DistributedDataParallel"""
LEAST_ITERATIONS, MOST_ITERATIONS = 10, 2000
"""fewest and most iterations that are timed"""
FIRST_LOSS_BUDGET = 1e-3
"""largest relative difference of the first timed loss from the first warm-up loss, which has the
same weights and samples"""
ROW_NOTE = (
    "Inputs stay in GPU memory and the sample indices advance, so every iteration draws anew; no "
    "data loader. Weights are random in every layer. One GPU, optimizer unsharded. Memory: peak "
    "after warm-up."
)


class ThroughputRow(Conditions):
    """One recipe at one batch size. None: not measured, or not known of this GPU."""

    gpu: str
    precision: str
    """where each number format is used, in words"""
    implementation: str
    """the recipe's name; with `_eager` where no CUDA graph is used"""
    graph: bool
    attention: str | None
    """the only kernel of torch's attention that is allowed"""
    kernels: dict[str, str] | None
    """backend by op of sd_kernels"""
    samples_per_second: float | None
    """median of the second half of the run"""
    samples_per_second_first_tenth: float | None
    ms_per_sample: float | None
    ms_per_iteration: float | None
    mfu: float | None
    """model FLOP/s (`FLOPS_PER_SAMPLE`) over the data sheet's dense bf16 peak"""
    timed_iterations: int | None
    peak_memory_bytes: int | None
    peak_reserved_bytes: int | None
    sm_clock_mhz: float | None
    power_w: float | None
    temperature_c: float | None
    clock_event_reasons: list[str] | None
    loss_warm_up: float | None
    """of the first warm-up iteration"""
    loss_start: float | None
    """of the first iteration after the reset: the same weights and samples"""
    loss_end: float | None
    predicted_samples_per_second: float | None
    """by `sd-perf estimate`"""
    predicted_memory_bytes: float | None
    status: Status
    reason: str | None
    notes: str


@dataclass(frozen=True)
class TimedRecipe:
    """What one row measures: a recipe at a batch size, in a CUDA graph or eager."""

    recipe: Recipe
    batch: int
    graph: bool

    @property
    def title(self) -> str:
        """Name in a list of what is timed."""
        return f"{self.recipe.implementation}{'' if self.graph else '_eager'}, batch {self.batch}"

    @property
    def least_seconds(self) -> float:
        """Seconds that must be left for it to be begun."""
        return COMPILE_SECONDS if self.recipe.compiled else 0.0

    @property
    def most_seconds(self) -> float:
        """Seconds that it may take."""
        return START_SECONDS + self.timed_seconds + self.least_seconds

    @property
    def timed_seconds(self) -> float:
        """Seconds for which iterations are timed, where that many are left."""
        return TIMED_SECONDS if self.graph else EAGER_SECONDS


RECIPES = {
    recipe.implementation: recipe
    for recipe in (
        FAST_BF16,
        FAST_FP8,
        AUTOCAST,
        MASTERS,
        COMPILED,
        DIFFUSERS,
        DIFFUSERS_COMPILED,
    )
}
"""recipes that are timed, by name"""


def fast(batch: int) -> list[TimedRecipe]:
    """The fast iteration eager, which shows most of what can be wrong, and then captured."""
    return [TimedRecipe(FAST_BF16, batch, graph=graph) for graph in (False, True)]


def fp8(batch: int) -> list[TimedRecipe]:
    """The fast iteration in FP8."""
    return [TimedRecipe(FAST_FP8, batch, graph=True)]


def other_batches(batches: Sequence[int]) -> list[TimedRecipe]:
    """The fast iteration at other batch sizes; eager at the smallest, where launches weigh most."""
    eager = TimedRecipe(FAST_BF16, min(batches), graph=False)
    captured = (TimedRecipe(FAST_BF16, batch, graph=True) for batch in sorted(batches)[::-1])
    return [*captured, eager]


def rivals(batch: int) -> list[TimedRecipe]:
    """The plain network, and diffusers'."""
    return [
        TimedRecipe(MASTERS, batch, graph=True),
        TimedRecipe(AUTOCAST, batch, graph=False),
        TimedRecipe(AUTOCAST, batch, graph=True),
        TimedRecipe(DIFFUSERS, batch, graph=False),
        TimedRecipe(MASTERS, batch, graph=False),
    ]


def compiled(batch: int) -> list[TimedRecipe]:
    """Networks under torch.compile."""
    return [TimedRecipe(recipe, batch, graph=True) for recipe in (COMPILED, DIFFUSERS_COMPILED)]


@cache
def predictions(gpu: str, batch: int) -> dict[str, Any]:
    """Figures of `sd-perf estimate` for a GPU and a batch, by recipe.

    Empty where it does not know the GPU, and, with a line printed, where it fails.
    """
    name = key_of_driver(gpu)
    if name is None:
        return {}
    figures = attempt(partial(predict, Config(), name, batch))
    if "recipes" not in figures:  # measurements are worth having without it
        print(f"no estimate for batch {batch}: {figures['reason']}", flush=True)
    return figures.get("recipes", {})


def make_row(gpu: str, entry: TimedRecipe, measured: dict[str, Any]) -> ThroughputRow:
    """A row from the measured columns: `time_iterations`', or `status` and `reason`."""
    recipe = entry.recipe
    rate, peak = measured.get("samples_per_second"), peak_of_driver(gpu)
    known = predictions(gpu, entry.batch) if recipe.estimated_as else {}
    predicted = known.get(recipe.estimated_as)
    columns: dict[str, Any] = {
        **dict.fromkeys(ThroughputRow.__annotations__),
        "status": "measured",
        **measured,
        "gpu": gpu,
        "batch": entry.batch,
        "precision": recipe.precision,
        "dtype": str(recipe.weights).removeprefix("torch."),
        "cached": "moments and text states",
        "implementation": recipe.implementation + ("" if entry.graph else "_eager"),
        "graph": entry.graph,
        "attention": recipe.attention.name if recipe.attention else None,
        "mfu": rate * FLOPS_PER_SAMPLE / peak.value if rate and peak else None,
        "predicted_samples_per_second": predicted and predicted["samples_per_second"],
        "predicted_memory_bytes": predicted and predicted["memory_bytes"]["total"],
        "notes": ROW_NOTE,
    }
    return ThroughputRow(**columns)  # type: ignore[typeddict-item]


def row_line(row: ThroughputRow) -> str:
    """A row as one line of text."""
    name = f"{row['implementation']:32s} batch {row['batch']:3d}"
    if row["samples_per_second"] is None:
        return f"{name}  {row['status']}: {row['reason']}"
    mfu = "  n/a" if row["mfu"] is None else f"{100 * row['mfu']:4.1f}%"
    clock = "?" if row["sm_clock_mhz"] is None else f"{row['sm_clock_mhz']:.0f}"
    power = "?" if row["power_w"] is None else f"{row['power_w']:.0f}"
    memory = f"{(row['peak_memory_bytes'] or 0) / 2**30:5.1f} GiB"
    if row["predicted_memory_bytes"] is not None:
        memory += f" (estimate {row['predicted_memory_bytes'] / 2**30:.1f})"
    return (
        f"{name}  {row['samples_per_second']:7.1f} samples/s  {row['ms_per_sample']:6.2f} "
        f"ms/sample  MFU {mfu}  {memory}  {clock} MHz  {power} W  "
        f"loss {row['loss_start']:.3f} -> {row['loss_end']:.3f}"
        + ("" if row["status"] == "measured" else f"  {row['reason']}: not to be quoted")
    )


def check_losses(warm_up: float, start: float, end: float) -> None:
    """ValueError where the timed iterations did not start as the warm-up did, or did not train."""
    if not abs(start - warm_up) <= FIRST_LOSS_BUDGET * abs(warm_up):
        raise ValueError(
            f"the first timed loss is {start}, but the same iteration in warm-up had {warm_up}"
        )
    if not math.isfinite(end):
        raise ValueError(f"the loss is {end} at the end")


def time_iterations(entry: TimedRecipe, seconds: float, device: Device) -> dict[str, Any]:
    """Measured columns of one row, taking about `seconds` with warm-up and capture.

    The current stream must be a side stream.
    """
    budget = Budget(seconds)
    config, latents = device.full
    workload = entry.recipe.workload(config, entry.batch, device.name, latent_size=latents)
    warm_up_losses = []
    with tuned(ALGORITHMS):  # now, so that the capture has the fastest
        for _ in range(WARM_UP_ITERATIONS):
            workload.iteration()
            warm_up_losses.append(workload.loss.item())
    workload.reset()
    device.restart_peak_memory()  # timing the algorithms leaves workspaces behind
    call = workload.capture() if entry.graph else workload.iteration
    call()
    loss_start = workload.loss.item()
    seconds_each = timed(call, 2, device.clock())[-1] / 1000
    left = min(entry.timed_seconds, device.most_seconds, budget.left())
    count = repetitions(left, seconds_each, least=LEAST_ITERATIONS, most=MOST_ITERATIONS)
    with device.telemetry() as telemetry:
        intervals = timed(call, count, device.clock())
    loss_end = workload.loss.item()
    check_losses(warm_up_losses[0], start=loss_start, end=loss_end)
    return {
        **rates(intervals, entry.batch),
        "kernels": dict(workload.kernels) or None,
        "timed_iterations": count,
        **device.peak_memory(),
        **telemetry.summary(),
        "loss_warm_up": warm_up_losses[0],
        "loss_start": loss_start,
        "loss_end": loss_end,
    }


def measure(entry: TimedRecipe, seconds: float, device: Device) -> dict[str, Any]:
    """`time_iterations` on a side stream, or `status` and `reason` where that cannot be.

    The device's memory is free again afterwards.
    """
    needed = entry.recipe.requires
    if needed and importlib.util.find_spec(needed) is None:
        return {"status": "absent", "reason": f"{needed} is not installed"}

    def on_side_stream() -> dict[str, Any]:
        with device.side_stream():
            return time_iterations(entry, seconds, device)

    measured = attempt(on_side_stream)
    torch._dynamo.reset()
    attempt(release_memory)  # a broken GPU refuses this too; the row that tells of it must stay
    return measured


def measure_rows(
    gpu: str,
    entries: list[TimedRecipe],
    budget: Budget,
    measure_one: Callable[[TimedRecipe, float], dict[str, Any]],
    save: Callable[[list[ThroughputRow]], None],
) -> list[ThroughputRow]:
    """A row per entry, printed as it is made; each gets its share of the seconds left.

    An entry that comes too late says so in its row. `save` gets all rows so far after every entry.
    Whether what was timed is right is not known here: see `gpu_report`.
    """
    rows: list[ThroughputRow] = []
    for done, entry in enumerate(entries):
        left = budget.left()
        later = sum(each.most_seconds for each in entries[done:])
        share = left * entry.most_seconds / later
        if left > entry.least_seconds:
            measured = measure_one(entry, min(share, entry.most_seconds))
        else:
            reason = f"too little was left of the budget of {budget.seconds:g} s"
            measured = {"status": "left out", "reason": reason}
        rows.append(make_row(gpu, entry, measured))
        print(f"{row_line(rows[-1])}  ({budget.left():.0f} s left)", flush=True)
        save(rows)
    return rows
