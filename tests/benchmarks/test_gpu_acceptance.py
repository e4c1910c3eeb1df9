"""The logic of the GPU baseline, on a CPU: no number of these tests is a result."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from benchmarks import gpu_acceptance, gpu_checks, gpu_environment, gpu_profile, timing
from benchmarks.gpu_acceptance import (
    Rung,
    attempt,
    check_losses,
    exit_code,
    make_row,
    measure_rows,
    plan_rungs,
    summary,
)
from benchmarks.gpu_fast import FAST_BF16, FAST_FP8
from benchmarks.gpu_workload import (
    AUTOCAST,
    COMPILED,
    FP32,
    MASTERS,
    PlainWorkload,
    Recipe,
    make_inputs,
    randomize,
)
from sd_perf.config import Config, DiffusionConfig, UNetConfig
from sd_perf.reference.step import DiffusionStep
from sd_perf.reference.unet import UNet
from sd_perf.training.optimizer import build_optimizer

ROOT = Path(__file__).parents[2]
TINY = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2),
    attention_resolutions=(1, 2),
    num_head_channels=32,
    context_dim=32,
    transformer_groups=8,
)
RECIPES = [
    dataclasses.replace(recipe, attention=SDPBackend.MATH) for recipe in (FP32, AUTOCAST, MASTERS)
]
H100 = "NVIDIA H100 80GB HBM3"
MEASURED = {
    "samples_per_second": 100.0,
    "ms_per_sample": 10.0,
    "peak_memory_bytes": 2**30,
    "loss_start": 1.0,
    "loss_end": 0.9,
}


class FakeClock:
    """A clock whose intervals are given."""

    def __init__(self, milliseconds: list[float]) -> None:
        self._milliseconds = milliseconds
        self._marks = 0

    def mark(self) -> None:
        self._marks += 1

    def intervals(self) -> list[float]:
        return self._milliseconds[: self._marks - 1]


def tiny_workload(recipe: Recipe) -> PlainWorkload:
    return PlainWorkload(recipe, TINY, batch=2, device="cpu", latent_size=8, context_tokens=5)


def make_report(rows: list[dict[str, Any]], checks: list[gpu_checks.Check]) -> dict[str, Any]:
    report = {
        "environment": {"gpu": H100, "torch": torch.__version__},
        "correctness": checks,
        "rows": rows,
    }
    return report | {
        "kernels": [],
        "profile": {},
        "notes": [],
        "command": "",
        "git_sha": None,
        "date": "2026-01-01",
    }


def test_rates_are_those_of_the_settled_half() -> None:
    calls: list[int] = []
    intervals = timing.timed(
        lambda: calls.append(0), 10, FakeClock([50.0] * 5 + [100.0, 100.0, 100.0, 900.0, 100.0])
    )
    rates = timing.rates(intervals, batch=20)
    assert len(calls) == 10
    assert rates["ms_per_iteration"] == 100.0
    assert rates["ms_per_sample"] == 5.0
    assert rates["samples_per_second"] == 200.0
    assert rates["samples_per_second_first_tenth"] == 400.0


def test_budget_can_be_overspent() -> None:
    now = iter([0.0, 10.0, 130.0])
    budget = timing.Budget(100.0, lambda: next(now))
    assert budget.left() == 90.0
    assert budget.left() == -30.0
    assert timing.repetitions(-5.0, 0.1, least=10, most=100) == 10
    assert timing.repetitions(5.0, 0.1, least=10, most=40) == 40
    assert timing.repetitions(5.0, 0.25, least=10, most=40) == 20


def test_an_unknown_gpu_has_no_peak() -> None:
    assert gpu_environment.peak_flops(H100) == 989e12
    assert gpu_environment.peak_flops("NVIDIA H100 PCIe") is None
    rung = Rung(AUTOCAST, 8, True)
    assert make_row(H100, rung, MEASURED)["mfu"] == pytest.approx(0.2436, abs=1e-4)
    assert make_row("NVIDIA H100 PCIe", rung, MEASURED)["mfu"] is None


def test_telemetry_tells_of_the_settled_half() -> None:
    samples = [
        ["345", "80", "30", "0x1"],
        ["1980", "400", "45", "0x0"],
        ["1755", "695.2", "61", "0x0000000000000004"],
        ["1725", "[N/A]", "63", "0x24"],
    ]
    assert gpu_environment.summarise_telemetry(samples) == {
        "sm_clock_mhz": 1740.0,
        "power_w": 695.2,
        "temperature_c": 63.0,
        "clock_event_reasons": ["software power cap", "software thermal slowdown"],
    }
    assert set(gpu_environment.summarise_telemetry([]).values()) == {None}


def test_telemetry_samples_while_the_block_runs() -> None:
    answers = itertools.count()
    third = threading.Event()

    def query() -> list[str] | None:
        number = next(answers)
        if number == 3:
            third.set()
        return None if number == 0 else [str(1000 + number), "1", "2", "0x0"]

    with gpu_environment.Telemetry(query, period_seconds=0.001) as telemetry:
        assert third.wait(10)
    assert telemetry.summary()["sm_clock_mhz"] >= 1001


def test_nvidia_smi_is_only_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def answer(command: list[str]) -> str:
        commands.append(command)
        return "1980, 695.2"

    monkeypatch.setattr(gpu_environment, "_output_of", answer)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="12-34")
    )
    assert gpu_environment.nvidia_smi(("clocks.sm", "power.draw")) == ["1980", "695.2"]
    query = "--query-gpu=clocks.sm,power.draw"
    assert commands == [["nvidia-smi", query, "--format=csv,noheader,nounits", "--id=GPU-12-34"]]
    assert gpu_environment.nvidia_smi(("clocks.sm",)) is None


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.implementation)
def test_replays_that_do_the_same_are_green(recipe: Recipe) -> None:
    workload = tiny_workload(recipe)
    checks = gpu_checks.check_replay(workload, lambda: workload.iteration, recipe)
    assert [check["error"] for check in checks] == [0, 0, 0]
    assert gpu_checks.passed(checks)


def _skip_draws(workload: PlainWorkload) -> Callable[[], object]:
    def replay() -> None:
        workload.iteration()
        workload.sample_indices.copy_(torch.arange(workload.batch))

    return replay


def _skip_optimizer(workload: PlainWorkload) -> Callable[[], object]:
    workload.optimizer.step = lambda: None  # type: ignore[assignment,method-assign]
    return workload.iteration


def _run_while_capturing(workload: PlainWorkload) -> Callable[[], object]:
    workload.iteration()
    return workload.iteration


@pytest.mark.parametrize("broken", [_skip_draws, _skip_optimizer, _run_while_capturing])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.implementation)
def test_replays_that_differ_are_red(
    recipe: Recipe, broken: Callable[[PlainWorkload], Callable[[], object]]
) -> None:
    workload = tiny_workload(recipe)
    checks = gpu_checks.check_replay(workload, lambda: broken(workload), recipe)
    assert not gpu_checks.passed(checks)


def test_the_iteration_is_the_reference_step() -> None:
    workload = tiny_workload(RECIPES[0])
    unet = UNet(TINY)
    randomize(unet, seed=0)
    optimizer = build_optimizer(unet, Config())
    optimizer.param_groups[0]["lr"] = Config().learning_rate
    step = DiffusionStep(DiffusionConfig(), seed=0)
    indices = torch.arange(2)
    moments, context = make_inputs(TINY, indices, latent_size=8, context_tokens=5, seed=0)
    for number in range(3):
        workload.iteration()
        optimizer.zero_grad()
        loss = step(unet, moments, context, indices + 2 * number)
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(workload.loss, loss.detach(), rtol=1e-5, atol=0)
    for mine, plain in zip(workload.masters(), unet.parameters(), strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=2e-5)


def test_bf16_weights_are_the_rounded_masters() -> None:
    workload = tiny_workload(RECIPES[2])
    before = workload.masters()[0].clone()
    for _ in range(3):
        workload.iteration()
    assert not torch.equal(before, workload.masters()[0])
    for weight, master in zip(workload.unet.parameters(), workload.masters(), strict=True):
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, master.bfloat16())


def test_draws_and_precisions_are_held_to_a_reference() -> None:
    assert gpu_checks.passed(gpu_checks.check_draws("cpu"))
    checks = gpu_checks.check_precisions(TINY, 8, RECIPES, "cpu", "cpu", gradients=True)
    assert len(checks) == 6
    assert gpu_checks.passed(checks)
    errors = {check["check"]: check["error"] for check in checks}
    assert errors["plain_fp32: output"] < 1e-5 < 1e-3 < errors["plain_autocast: output"]
    mislabelled = [dataclasses.replace(RECIPES[1], implementation="plain_fp32")]
    assert not gpu_checks.passed(
        gpu_checks.check_precisions(TINY, 8, mislabelled, "cpu", "cpu", gradients=False)
    )


def test_nan_never_passes_and_nothing_is_not_green() -> None:
    check = gpu_checks.make_check("a", float("nan"), 1.0)
    assert not check["passed"]
    assert check["error"] is None
    assert not gpu_checks.passed([])


def test_bits_are_compared_not_values() -> None:
    nan = torch.tensor([float("nan"), 0.0, 1.0])
    assert gpu_checks.differing([nan], [nan.clone()]) == 0
    assert gpu_checks.differing([nan], [torch.tensor([float("nan"), -0.0, 1.0])]) == 1


def test_memory_that_runs_out_is_a_row_and_not_a_crash() -> None:
    def fail_to_end_the_capture() -> dict[str, Any]:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        finally:
            raise RuntimeError("capture invalidated")

    def break_otherwise() -> dict[str, Any]:
        raise RuntimeError("no kernel")

    assert attempt(lambda: MEASURED) == MEASURED
    assert attempt(fail_to_end_the_capture)["status"] == "out of memory"
    assert attempt(break_otherwise) == {"status": "failed", "reason": "no kernel"}


def test_a_run_that_does_not_train_is_not_timed() -> None:
    check_losses(1.0, 1.0005, 0.5)
    with pytest.raises(ValueError, match="first timed loss"):
        check_losses(1.0, 1.1, 0.5)
    with pytest.raises(ValueError, match="first timed loss"):
        check_losses(1.0, float("nan"), 0.5)
    with pytest.raises(ValueError, match="at the end"):
        check_losses(1.0, 1.0, float("nan"))


@pytest.mark.parametrize("graph", [True, False])
def test_a_rung_is_timed_in_the_seconds_it_has(
    graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = tiny_workload(RECIPES[1])
    telemetry = gpu_environment.Telemetry(lambda: None)
    monkeypatch.setattr(workload, "capture", lambda: SimpleNamespace(replay=workload.iteration))
    monkeypatch.setattr(Recipe, "workload", lambda *_: workload)
    monkeypatch.setattr(gpu_acceptance, "CudaClock", lambda: FakeClock([50.0] * 100))
    monkeypatch.setattr(gpu_acceptance, "Telemetry", lambda: telemetry)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    rung = Rung(RECIPES[1], 2, graph)
    row = make_row("a CPU", rung, gpu_acceptance.time_iterations(rung, seconds=0.5))
    assert row["status"] == "measured"
    assert row["mfu"] is None
    assert row["timed_iterations"] == gpu_acceptance.LEAST_REPLAYS
    assert row["samples_per_second"] == 40.0
    assert row["loss_start"] == row["loss_warm_up"]
    assert row["loss_end"] != row["loss_start"]
    missing = {key for key in gpu_acceptance.MEASURED_KEYS if row[key] is None}
    assert missing == {"mfu", *gpu_environment.TELEMETRY_KEYS}
    assert row["kernels"] is row["predicted_memory_bytes"] is None
    assert "samples/s" in summary(make_report([row], []))


def test_rows_of_a_run_that_meets_everything() -> None:
    outcomes = iter(
        [
            MEASURED,
            {"status": "out of memory", "reason": "2 GiB"},
            {"status": "failed", "reason": "odd"},
        ]
    )
    clock = itertools.count(0.0, 6.0)
    saved: list[int] = []
    green = [gpu_checks.make_check("draws", 0.0, 0.0)]
    recipes = (FAST_BF16, FAST_BF16, AUTOCAST, MASTERS, COMPILED)
    rows = measure_rows(
        H100,
        [
            Rung(recipe, batch, True)
            for recipe, batch in zip(recipes, (64, 8, 32, 32, 32), strict=True)
        ],
        timing.Budget(40.0, lambda: next(clock)),
        green,
        lambda rung, seconds: next(outcomes),
        lambda rows: saved.append(len(rows)),
    )
    assert saved == [1, 2, 3, 4, 5]
    assert [row["status"] for row in rows] == [
        "measured",
        "out of memory",
        "failed",
        "left out",
        "left out",
    ]
    assert len({tuple(row) for row in rows}) == 1
    assert all(row["samples_per_second"] is None for row in rows[1:])
    predicted = [row["predicted_memory_bytes"] for row in rows]
    assert predicted[0] > predicted[1] > 0 < predicted[2]
    assert predicted[3:] == [None, None]

    report = make_report(rows, green)
    json.dumps(report, allow_nan=False)
    text = summary(report)
    assert "24.4%" in text
    assert f"(estimate {predicted[0] / 2**30:.1f})" in text
    assert "left out: too little was left of the budget of 40 s" in text.splitlines()[-1]
    assert exit_code(report, ["correctness", "throughput"]) == 1
    assert exit_code(make_report(rows[:2], green), ["correctness", "throughput"]) == 0
    assert exit_code(make_report([], []), ["environment"]) == 0
    assert (
        exit_code(
            make_report([], []) | {"profile": {"status": "failed", "reason": "odd"}}, ["profile"]
        )
        == 1
    )


def test_the_fast_ones_come_first_and_compiling_last() -> None:
    rungs = plan_rungs([8, 64], rival_batch=32)
    fast = [(FAST_BF16, 64), (FAST_BF16, 8), (FAST_FP8, 64), (FAST_FP8, 8)]
    assert [(rung.recipe, rung.batch) for rung in rungs[:4]] == fast
    names = [make_row(H100, rung, {})["implementation"] for rung in rungs[4:]]
    assert names[:3] == ["fast_bf16_eager", "plain_autocast_eager", "plain_bf16_masters_eager"]
    assert [rung.recipe.compiled for rung in rungs].index(True) == len(rungs) - 2
    assert {rung.batch for rung in rungs[5:]} == {32}


def test_compiling_is_not_begun_late() -> None:
    asked: list[tuple[str, float]] = []

    def measure(rung: Rung, seconds: float) -> dict[str, Any]:
        asked.append((rung.recipe.implementation, seconds))
        return MEASURED

    rungs = [Rung(recipe, 8, True) for recipe in (AUTOCAST, COMPILED, AUTOCAST)]
    for seconds in (10.0, 600.0):
        measure_rows(
            H100, rungs, timing.Budget(seconds, lambda: 0.0), [], measure, lambda rows: None
        )
    late, early = asked[:2], asked[2:]
    assert [name for name, _ in late] == ["plain_autocast"] * 2
    assert [name for name, _ in early] == [
        "plain_autocast",
        COMPILED.implementation,
        "plain_autocast",
    ]
    most = gpu_acceptance.MOST_SECONDS
    assert [seconds for _, seconds in early] == [most, most + gpu_acceptance.COMPILE_SECONDS, most]


def test_what_is_not_installed_is_absent() -> None:
    rung = Rung(dataclasses.replace(AUTOCAST, requires="no_such_package"), 8, False)
    row = make_row(H100, rung, gpu_acceptance.measure_rung(rung, 1.0))
    assert (row["status"], row["reason"]) == ("absent", "no_such_package is not installed")
    assert exit_code(make_report([row], []), ["throughput"]) == 0
    assert "absent: no_such_package is not installed" in summary(make_report([row], []))


def test_green_code_is_profiled_and_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def profile(recipe: Recipe, batch: int, predicted: dict[str, float]) -> dict[str, Any]:
        measured = {
            op: {"ms": 2 * floor, "kernels": 1, "longest": {}} for op, floor in predicted.items()
        }
        rows = gpu_profile.compare(measured, predicted)
        return {"status": "measured", "recipe": recipe.implementation, "batch": batch, "ops": rows}

    monkeypatch.setattr(gpu_acceptance, "describe", lambda: {"gpu": H100, "torch": "2"})
    green = gpu_checks.make_check("draws", 0.0, 0.0)
    monkeypatch.setattr(gpu_acceptance, "gpu_checks", lambda: [("draws", lambda: [green])])
    monkeypatch.setattr(gpu_acceptance, "measure_rung", lambda rung, seconds: MEASURED)
    monkeypatch.setattr(gpu_profile, "measure_profile", profile)
    monkeypatch.setattr(gpu_acceptance, "set_arithmetic", lambda timing: None)
    parts = "correctness,profile,throughput"
    arguments = [
        "--output",
        str(tmp_path),
        "--parts",
        parts,
        "--git-sha",
        "abc",
        "--batches",
        "8,64",
    ]
    report = make_report([], [])
    gpu_acceptance.run_parts(
        report, gpu_acceptance.parse(arguments), timing.Budget(600), lambda: None
    )
    assert {row["status"] for row in report["rows"]} == {"measured"}
    ops = report["profile"]["ops"]
    assert report["profile"]["batch"] == 64
    assert (
        ops[0]["op"] == "conv"
    )  # what takes longest has the largest gap where all take twice the floor
    assert ops[0]["predicted_ms"] == pytest.approx(64 * 1.362, rel=1e-2)
    assert {row["ratio"] for row in ops} == {2.0}
    json.dumps(report, allow_nan=False)
    assert "largest gap first" in summary(report)
    assert exit_code(report, parts.split(",")) == 0


def test_without_an_estimate_there_are_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> dict[str, Any]:
        raise RuntimeError("odd")

    monkeypatch.setattr(gpu_acceptance, "estimate", fail)
    gpu_acceptance.predictions.cache_clear()
    row = make_row(H100, Rung(FAST_BF16, 8, True), MEASURED)
    gpu_acceptance.predictions.cache_clear()
    assert (row["status"], row["predicted_memory_bytes"]) == ("measured", None)


def test_red_code_gets_no_speed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> dict[str, Any]:
        raise AssertionError("timed although red")

    def break_down() -> list[gpu_checks.Check]:
        raise RuntimeError("No available kernel")

    groups = [
        ("draws", lambda: [gpu_checks.make_check("draws", 0.0, 0.0)]),
        ("attention", break_down),
    ]
    monkeypatch.setattr(gpu_acceptance, "describe", lambda: {"gpu": H100, "torch": "2"})
    monkeypatch.setattr(gpu_acceptance, "gpu_checks", lambda: groups)
    monkeypatch.setattr(gpu_acceptance, "measure_rung", refuse)
    monkeypatch.setattr(gpu_profile, "measure_profile", refuse)
    monkeypatch.setattr(gpu_acceptance, "set_arithmetic", lambda timing: None)
    parts = "correctness,profile,throughput"
    options = gpu_acceptance.parse(
        ["--output", str(tmp_path), "--parts", parts, "--git-sha", "abc"]
    )
    report = make_report([], [])
    gpu_acceptance.run_parts(report, options, timing.Budget(60), lambda: None)
    assert {row["status"] for row in [report["profile"], *report["rows"]]} == {"red"}
    assert [check["passed"] for check in report["correctness"]] == [True, False]
    assert report["correctness"][1]["note"] == "No available kernel"
    assert report["git_sha"] == "abc"
    assert "Not all was timed" in summary(report).splitlines()[-1]
    assert exit_code(report, options.parts) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "8,x"], "whole numbers"),
        (["--batches", "0"], "at least 1"),
        (["--parts", "speed"], "no part is called 'speed'"),
        (["--parts", "throughput"], "throughput needs correctness"),
        (["--parts", "profile"], "profile needs correctness"),
        (["--rival-batch", "0"], "at least 1"),
    ],
)
def test_options_that_make_no_sense(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        gpu_acceptance.parse(["--output", str(tmp_path), *arguments])
    assert leaving.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_acceptance.main(["--output", str(tmp_path / "out")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


BLOCKED_IMPORTS = """
import importlib.abc, importlib.machinery, sys

ALLOWED = {
    "torch", "triton", "numpy", "torchgen", "functorch",
    "filelock", "typing_extensions", "sympy", "mpmath", "networkx", "jinja2", "markupsafe",
    "fsspec",
    "setuptools", "_distutils_hack", "pkg_resources",
    "sd_perf", "sd_kernels",
    "benchmarks",
}

class Blocker(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        known = top in ALLOWED or top in sys.stdlib_module_names
        if not (known or top.startswith("_sysconfigdata")):
            # torch also asks whether there are packages that it then does not import: a spec, as
            # without a blocker.
            if importlib.machinery.PathFinder.find_spec(name, path) is not None:
                return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec):
        raise ModuleNotFoundError(f"{spec.name} is blocked", name=spec.name)

    def exec_module(self, module):
        raise AssertionError

sys.meta_path.insert(0, Blocker())
for name in ("yaml", "PIL", "tyro"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    sys.exit(f"{name} is not blocked")
from benchmarks import gpu_acceptance, kernel_speed
import sd_perf.config, sd_perf.fast.choice, sd_perf.reference.step, sd_perf.reference.unet
import os, sd_kernels
for package in (sd_kernels, sd_perf):  # of this checkout, installed or not
    place, checkout = os.path.realpath(package.__path__[0]), os.path.realpath(os.getcwd())
    assert place.startswith(checkout + os.sep), place
gpu_acceptance.parse(["--output", "unused"])
assert gpu_acceptance.predictions("NVIDIA H100 80GB HBM3", 64)["fused"]["by_op"]
assert kernel_speed.plan(kernel_speed.parse([]), kernel_speed.GPUS["h100"].target)
"""


def test_torch_triton_and_numpy_are_enough() -> None:
    command = [sys.executable, "-E", "-c", BLOCKED_IMPORTS]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
