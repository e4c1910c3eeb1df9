"""Rows of training throughput, with times that are made up."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import gpu_environment, gpu_throughput, timing
from benchmarks.gpu_fast import FAST_BF16
from benchmarks.gpu_throughput import (
    TimedRecipe,
    check_losses,
    make_row,
    measure_rows,
    row_line,
)
from benchmarks.gpu_workload import AUTOCAST, COMPILED, Recipe
from sd_kernels.targets import GPUS, peak_of_driver
from tests.benchmarks.tiny import H100, RECIPES, THROUGHPUT, FakeDevice, tiny_workload


def test_an_unknown_gpu_has_no_peak() -> None:
    assert peak_of_driver(H100) == (989e12, GPUS["h100"].peak.source)
    assert peak_of_driver("NVIDIA H100 PCIe") is None
    entry = TimedRecipe(AUTOCAST, 8, graph=True)
    assert make_row(H100, entry, THROUGHPUT)["mfu"] == pytest.approx(0.2436, abs=1e-4)
    assert make_row("NVIDIA H100 PCIe", entry, THROUGHPUT)["mfu"] is None


def test_a_run_that_does_not_train_is_not_timed() -> None:
    check_losses(1.0, 1.0005, 0.5)
    with pytest.raises(ValueError, match="first timed loss"):
        check_losses(1.0, 1.1, 0.5)
    with pytest.raises(ValueError, match="first timed loss"):
        check_losses(1.0, float("nan"), 0.5)
    with pytest.raises(ValueError, match="at the end"):
        check_losses(1.0, 1.0, float("nan"))


@pytest.mark.parametrize("graph", [True, False])
def test_an_entry_is_timed_in_the_seconds_it_has(
    graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = tiny_workload(RECIPES[1])
    monkeypatch.setattr(Recipe, "workload", lambda *_, **sizes: workload)
    entry = TimedRecipe(RECIPES[1], 2, graph=graph)
    measured = gpu_throughput.time_iterations(entry, seconds=0.5, device=FakeDevice(50.0))
    row = make_row("a CPU", entry, measured)
    assert row["status"] == "measured"
    assert row["mfu"] is None
    assert row["timed_iterations"] == gpu_throughput.LEAST_ITERATIONS
    assert row["samples_per_second"] == 40.0
    assert row["loss_start"] == row["loss_warm_up"]
    assert row["loss_end"] != row["loss_start"]
    unknown = {"mfu", "kernels", "predicted_samples_per_second", "predicted_memory_bytes"}
    unknown |= {"peak_memory_bytes", "peak_reserved_bytes"}
    missing = {key for key, value in row.items() if value is None}
    assert missing == {*unknown, "reason", *gpu_environment.summarise_telemetry([])}
    assert "samples/s" in row_line(row)


def test_what_is_timed() -> None:
    both, others = gpu_throughput.fast(64), gpu_throughput.other_batches([8, 32, 16])
    rivals, compiled = gpu_throughput.rivals(32), gpu_throughput.compiled(32)
    assert [each.title for each in both] == ["fast_bf16_eager, batch 64", "fast_bf16, batch 64"]
    assert [each.batch for each in others] == [32, 16, 8, 8]
    assert others[-1].title == "fast_bf16_eager, batch 8"
    assert not any(each.recipe.compiled for each in rivals)
    assert all(each.recipe.compiled for each in compiled)
    every = (*both, *others, *gpu_throughput.fp8(64), *rivals, *compiled)
    names = {each.recipe.implementation for each in every}
    assert names == gpu_throughput.RECIPES.keys()


def test_compiling_is_not_begun_late() -> None:
    asked: list[tuple[str, float]] = []

    def measure(entry: TimedRecipe, seconds: float) -> dict[str, Any]:
        asked.append((entry.recipe.implementation, seconds))
        return THROUGHPUT

    entries = [TimedRecipe(recipe, 8, graph=True) for recipe in (AUTOCAST, COMPILED, AUTOCAST)]
    for seconds in (10.0, 600.0):
        measure_rows(H100, entries, timing.Budget(seconds, lambda: 0.0), measure, lambda rows: None)
    late, early = asked[:2], asked[2:]
    assert [name for name, _ in late] == ["plain_autocast"] * 2
    assert [name for name, _ in early] == [
        "plain_autocast",
        COMPILED.implementation,
        "plain_autocast",
    ]
    most = gpu_throughput.START_SECONDS + gpu_throughput.TIMED_SECONDS
    assert [seconds for _, seconds in early] == [most, most + gpu_throughput.COMPILE_SECONDS, most]


def test_without_an_estimate_there_are_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> dict[str, Any]:
        raise RuntimeError("odd")

    monkeypatch.setattr(gpu_throughput, "predict", fail)
    gpu_throughput.predictions.cache_clear()
    row = make_row(H100, TimedRecipe(FAST_BF16, 8, graph=True), THROUGHPUT)
    gpu_throughput.predictions.cache_clear()
    assert (row["status"], row["predicted_memory_bytes"]) == ("measured", None)
