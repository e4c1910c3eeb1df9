"""The whole acceptance run on a CPU, with measurements that are made up: no number is a result."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_acceptance, gpu_profile, gpu_throughput, timing
from benchmarks.checks import Check, make_check
from benchmarks.gpu_acceptance import Report, exit_code, summary
from benchmarks.gpu_checks import Group
from benchmarks.gpu_fast import FAST_BF16
from benchmarks.gpu_throughput import ThroughputRow, TimedRecipe, make_row, measure_rows
from benchmarks.gpu_workload import AUTOCAST, COMPILED, MASTERS, Recipe
from sd_perf.tools.results import Provenance, read
from tests.benchmarks.tiny import H100, THROUGHPUT

ROOT = Path(__file__).parents[2]


def make_report(
    rows: list[ThroughputRow], checks: list[Check], profile: dict[str, Any] | None = None
) -> Report:
    provenance = Provenance(
        date="2026-01-01", command="", git_sha=None, machine={"gpu": H100}, versions={"torch": "2"}
    )
    return Report(
        Path("unused"), provenance, correctness=checks, throughput=rows, profile=profile or {}
    )


def begin(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[Report, argparse.Namespace]:
    """A report with nothing in it yet, and the options of its three most important parts."""
    monkeypatch.setattr(gpu_acceptance, "describe", lambda: {"gpu": H100})
    monkeypatch.setattr(gpu_acceptance, "set_arithmetic", lambda timing: None)
    parts = ("--parts", "correctness,profile,throughput", "--git-sha", "abc")
    options = gpu_acceptance.parse(["--output", str(folder), *parts, *arguments])
    return Report.begun(options), options


def test_the_arithmetic_that_was_set_can_be_read() -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic
    try:
        gpu_acceptance.set_arithmetic(timing=False)
        assert (cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic) == (False, False, True)
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.deterministic = before


def test_rows_of_a_run_that_meets_everything() -> None:
    outcomes = iter(
        [
            THROUGHPUT,
            {"status": "out of memory", "reason": "2 GiB"},
            {"status": "failed", "reason": "odd"},
        ]
    )
    clock = itertools.count(0.0, 6.0)
    saved: list[int] = []
    green = [make_check("draws", 0.0, 0.0)]
    recipes = (FAST_BF16, FAST_BF16, AUTOCAST, MASTERS, COMPILED)
    rows = measure_rows(
        H100,
        [
            TimedRecipe(recipe, batch, graph=True)
            for recipe, batch in zip(recipes, (64, 8, 32, 32, 32), strict=True)
        ],
        timing.Budget(40.0, lambda: next(clock)),
        green,
        lambda entry, seconds: next(outcomes),
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
    json.dumps(asdict(report.result()), allow_nan=False)
    text = summary(report)
    assert "24.4%" in text
    assert f"(estimate {predicted[0] / 2**30:.1f})" in text
    assert "left out: too little was left of the budget of 40 s" in text.splitlines()[-1]
    assert exit_code(report, ["correctness", "throughput"]) == 1
    assert exit_code(make_report(rows[:2], green), ["correctness", "throughput"]) == 0
    assert exit_code(make_report([], []), ["environment"]) == 0
    failed = make_report([], [], profile={"status": "failed", "reason": "odd"})
    assert exit_code(failed, ["profile"]) == 1


def test_what_is_not_installed_is_absent() -> None:
    entry = TimedRecipe(dataclasses.replace(AUTOCAST, requires="no_such_package"), 8, graph=False)
    row = make_row(H100, entry, gpu_throughput.measure(entry, 1.0))
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

    green = make_check("draws", 0.0, 0.0)
    monkeypatch.setattr(gpu_acceptance, "check_groups", lambda: [Group("draws", lambda: [green])])
    monkeypatch.setattr(gpu_throughput, "measure", lambda entry, seconds: THROUGHPUT)
    monkeypatch.setattr(gpu_profile, "measure_profile", profile)
    report, options = begin(tmp_path, monkeypatch, "--batches", "8,64")
    gpu_acceptance.run_parts(report, options, timing.Budget(600))
    assert {row["status"] for row in report.throughput} == {"measured"}
    ops = report.profile["ops"]
    assert report.profile["batch"] == 64
    # The op that takes longest has the largest gap where all take twice the floor.
    assert ops[0]["op"] == "conv"
    assert ops[0]["predicted_ms"] == pytest.approx(64 * 1.362, rel=1e-2)
    assert {row["ratio"] for row in ops} == {2.0}
    json.dumps(asdict(report.result()), allow_nan=False)
    assert (
        read(tmp_path / "gpu_acceptance.json", "gpu_acceptance", ThroughputRow) == report.result()
    )
    assert "largest gap first" in summary(report)
    assert exit_code(report, options.parts) == 0


def test_red_code_gets_no_speed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> dict[str, Any]:
        raise AssertionError("timed although red")

    def break_down() -> list[Check]:
        raise RuntimeError("No available kernel")

    groups = [
        Group("draws", lambda: [make_check("draws", 0.0, 0.0)]),
        Group("attention", break_down),
    ]
    monkeypatch.setattr(gpu_acceptance, "check_groups", lambda: groups)
    monkeypatch.setattr(gpu_throughput, "measure", refuse)
    monkeypatch.setattr(gpu_profile, "measure_profile", refuse)
    report, options = begin(tmp_path, monkeypatch)
    gpu_acceptance.run_parts(report, options, timing.Budget(60))
    assert {row["status"] for row in [report.profile, *report.throughput]} == {"red"}
    assert [check["passed"] for check in report.correctness] == [True, False]
    assert report.correctness[1]["note"] == "No available kernel"
    assert report.provenance.git_sha == "abc"
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
from benchmarks import gpu_acceptance, gpu_throughput, kernel_cases, kernel_speed
import sd_perf.config, sd_perf.fast.choice, sd_perf.reference.step, sd_perf.reference.unet
import os, sd_kernels
for package in (sd_kernels, sd_perf):  # of this checkout, installed or not
    place, checkout = os.path.realpath(package.__path__[0]), os.path.realpath(os.getcwd())
    assert place.startswith(checkout + os.sep), place
gpu_acceptance.parse(["--output", "unused"])
assert gpu_throughput.predictions("NVIDIA H100 80GB HBM3", 64)["fused"]["by_op"]
assert kernel_speed.parse([]) and kernel_cases.plan(kernel_speed.GPUS["h100"].target)
"""


def test_torch_triton_and_numpy_are_enough() -> None:
    command = [sys.executable, "-E", "-c", BLOCKED_IMPORTS]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
