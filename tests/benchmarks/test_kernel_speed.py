"""The logic of the kernel benchmark, on a CPU: no number of these tests is a result."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import kernel_speed, kernel_timing
from benchmarks.kernel_cases import COMPILED, Candidate, plan
from benchmarks.kernel_parity import (
    MOST_BYTES,
    ParityChecker,
    reduced,
    share_of_budget,
    small_cases,
)
from benchmarks.kernel_speed import is_bad, make_row, measure_all, parse, step_lines
from benchmarks.timing import Budget
from sd_kernels import geglu, harness
from sd_kernels.registry import all_ops, source_digest
from sd_kernels.spec import Case
from sd_kernels.targets import GPUS, Target
from tests.benchmarks.tiny import FakeDevice
from tests.kernels.faults import planted

H100 = GPUS["h100"].target
MACHINE = {"gpu": "a CPU", "torch": "2", "triton": "3", "copy_gb_per_second": 1.0}
SMALL = dataclasses.replace(geglu.SPEC.small_cases[2], calls=3)
MEASURED = {
    "status": "measured",
    "us": 10.0,
    "gb_per_second": 5.0,
    "percent_of_copy": 90.0,
    "tflop_per_second": 0.0,
}


def candidate(backend: str, unavailable: str = "") -> Candidate:
    return Candidate(geglu.SPEC, SMALL, backend, torch.float32, unavailable)


def measured(item: Candidate, seconds: float = 0.01) -> dict[str, dict[str, Any]]:
    """A candidate's columns on a CPU; every replay 'takes' 2 ms."""
    return kernel_timing.measure(
        item,
        ParityChecker("cpu"),
        copy_rate=1e9,
        l2_bytes=2**17,
        seconds=seconds,
        device=FakeDevice(2.0),
    )


def test_the_plan_has_every_backend_and_the_compiled_reference() -> None:
    items = plan(H100, ops=["geglu"])
    assert [item.backend for item in items[:3]] == ["triton", "reference", COMPILED]
    assert len(items) == 3 * len(geglu.SPEC.cases)
    assert all(item.case.shape["B"] == 64 and not item.unavailable for item in items)
    on_cpu = plan(Target("cpu", "cpu"), ops=["geglu"], case_filter="64 tokens", batch=2)
    assert [bool(item.unavailable) for item in on_cpu] == [True, False, False]
    assert on_cpu[0].case.shape["B"] == 2
    assert plan(H100, case_filter="no such case") == []


@pytest.mark.parametrize("spec", all_ops().values(), ids=lambda spec: spec.name)
def test_a_batch_scales_what_is_counted_in_samples(spec: Any) -> None:
    whole, half = (
        [item.case for item in plan(H100, ops=[spec.name], batch=batch) if item.backend == COMPILED]
        for batch in (64, 32)
    )
    assert [case.shape for case in whole] == [case.shape for case in spec.cases]
    for full, less in zip(whole, half, strict=True):
        assert "B" not in full.shape or 2 * less.shape["B"] == full.shape["B"]


def test_every_op_is_in_the_quick_plan_once() -> None:
    items = plan(H100, heaviest_only=True)
    assert {item.spec.name for item in items} == set(all_ops())
    assert len([item for item in items if item.backend == "reference"]) == len(all_ops())


@pytest.mark.parametrize("spec", all_ops().values(), ids=lambda spec: spec.name)
def test_a_case_is_reduced_until_it_fits_float64(spec: Any) -> None:
    for case in spec.cases:
        small = reduced(spec, case, spec.dtypes[-1])
        assert spec.work(small, spec.dtypes[-1]).forward_bytes <= MOST_BYTES
        assert small.shape.keys() == case.shape.keys() and small.draw == case.draw
    flat = Case("flat", {"B": 1, "L": 2**20, "N": 2**10})
    assert reduced(geglu.SPEC, flat, torch.float32).shape == {"B": 1, "L": 2**14, "N": 2**10}


def test_inputs_exceed_the_cache() -> None:
    sets = kernel_timing.input_sets(candidate("reference"), 2**18, "cpu")
    assert sum(inputs["x"].numel() * 4 for inputs in sets) >= 2 * 2**18
    assert not torch.equal(sets[0]["x"], sets[1]["x"])
    assert len(kernel_timing.input_sets(candidate("reference"), 1, "cpu")) == 1
    assert (
        len(kernel_timing.input_sets(candidate("reference"), 2**30, "cpu"))
        == kernel_timing.MOST_INPUT_SETS
    )


def test_forward_and_backward_are_those_of_the_op() -> None:
    function = geglu.SPEC.reference()
    sets = kernel_timing.input_sets(candidate("reference"), 2**17, "cpu")
    [out, *_] = [call() for call in kernel_timing.forwards(function, sets)]
    assert torch.equal(out, function(**sets[0]))
    calls = kernel_timing.backwards(function, sets)
    assert len(calls) == len(sets) > 1
    first, again = calls[0](), calls[0]()
    assert first[0].shape == sets[0]["x"].shape and torch.equal(first[0], again[0])


@pytest.mark.parametrize("op", ["conv", "linear", "skip_conv", "upsample_conv"])
def test_the_matmuls_of_a_backward_are_apart(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = all_ops()[op]
    item = Candidate(
        spec,
        next(case for case in spec.small_cases if case.name != "one row"),
        "reference",
        torch.float32,
    )
    assert item.directions() == ["forward", "dgrad", "wgrad"]
    work = spec.work(item.case, torch.float32)
    assert [item.flops(way) for way in item.directions()] == [work.flops] * 3
    assert [item.moved_bytes(way) for way in item.directions()] == [work.forward_bytes] * 3
    [inputs] = kernel_timing.input_sets(item, 1, "cpu")
    for way, names in (("dgrad", {"x", "skip"}), ("wgrad", {"weight", "bias"})):
        [call] = kernel_timing.backwards(spec.reference(), [inputs], way)
        expected = [
            inputs[name].shape for name in inputs if name in names and inputs[name] is not None
        ]
        assert [grad.shape for grad in call()] == expected


def test_the_backward_of_attention_is_counted_with_its_five_products() -> None:
    spec = all_ops()["attention"]
    item = Candidate(spec, spec.cases[0], "math", torch.bfloat16)
    assert item.directions() == ["forward", "backward"]
    assert item.flops("backward") == 2.5 * item.flops("forward") > 0


@pytest.mark.slow
def test_green_is_timed() -> None:
    found = measured(candidate("triton"))
    assert found.keys() == {"forward", "backward"}
    forward = found["forward"]
    assert (
        forward["status"] == "measured"
        and forward["parity"]["ok"]
        and forward["parity"]["checked"] > 20
    )
    # 2 ms for as many calls as take GRAPH_SECONDS at the speed of a copy
    assert forward["us"] == pytest.approx(2000 / forward["graph_calls"])
    assert forward["graph_calls"] % forward["input_sets"] == 0
    assert forward["gb_per_second"] == pytest.approx(
        candidate("triton").moved_bytes("forward") / forward["us"] / 1000
    )
    assert forward["tflop_per_second"] == 0
    assert forward["percent_of_copy"] == pytest.approx(100 * forward["gb_per_second"])
    row = make_row(MACHINE, candidate("triton"), "forward", forward)
    json.dumps(row, allow_nan=False)
    assert None not in [value for key, value in row.items() if key != "reason"]
    assert row["source"] == source_digest("geglu") and row["gpu"] == "a CPU"


def test_the_compiled_reference_is_held_to_the_same_rule(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(function: Any, dynamic: bool) -> Any:
        return lambda *given, **options: function(*given, **options) * 1.01

    monkeypatch.setattr(torch, "compile", wrong)
    found = measured(candidate(COMPILED))
    assert found["forward"]["status"] == "red" and "WRONG" in found["forward"]["reason"]
    rows = [make_row(MACHINE, candidate(COMPILED), way, found[way]) for way in found]
    assert not any(map(is_bad, rows))


def test_red_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> dict[str, Any]:
        raise AssertionError("timed although red")

    monkeypatch.setattr(kernel_timing, "time_direction", refuse)
    with planted("geglu", ("slope = cdf + gate", "slope = cdf - gate")) as function:
        monkeypatch.setattr(geglu.triton, "geglu", function)
        found = measured(candidate("triton"))
    for way in ("forward", "backward"):
        row = make_row(MACHINE, candidate("triton"), way, found[way])
        assert (row["status"], row["us"], row["parity"]["ok"]) == ("red", None, False)
        assert "grad x" in row["reason"] and "WRONG" in row["reason"]
        assert is_bad(row)


def test_nan_is_the_worst() -> None:
    verdict = harness.Verdict("geglu", "triton", "tiny", "float32", "y", "rms", 1.0, 1.0, 2.0)
    nan = dataclasses.replace(verdict, error=float("nan"))
    far = dataclasses.replace(verdict, error=1e9)
    assert max([verdict, nan, far], key=share_of_budget) is nan


def test_rows_of_a_run_that_meets_everything() -> None:
    def run_out_of_memory(_: Candidate) -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def fail(_: Candidate) -> dict[str, Any]:
        raise RuntimeError("no kernel")

    green = {"ok": True, "checked": 1, "worst": ""}
    outcomes = iter(
        [
            lambda _: {way: {"parity": green, **MEASURED} for way in ("forward", "backward")},
            run_out_of_memory,
            fail,
        ]
    )
    now = iter([0.0, 1.0, 2.0, 3.0, 99.0])
    saved: list[int] = []
    candidates = [
        candidate("triton"),
        candidate("apex", "No module named 'apex'"),
        *map(candidate, ["torch", "cudnn", "reference"]),
    ]
    rows = measure_all(
        candidates,
        MACHINE,
        Budget(10.0, lambda: next(now)),
        lambda item: next(outcomes)(item),
        lambda rows: saved.append(len(rows)),
    )
    assert saved == [2, 4, 6, 8, 10]
    statuses = ["measured", "absent", "out of memory", "failed", "left out"]
    assert [row["status"] for row in rows[::2]] == statuses
    assert [row["direction"] for row in rows[:2]] == ["forward", "backward"]
    assert len({tuple(row) for row in rows}) == 1
    assert [is_bad(row) for row in rows[::2]] == [False, False, False, True, False]
    assert [row["parity"]["ok"] for row in rows[::2]] == [True, False, False, False, False]
    json.dumps(rows, allow_nan=False)
    assert step_lines(rows) == ["geglu, these calls of one training step: triton 0.06 ms"]
    assert "10.0 us" in kernel_speed.row_line(rows[0]) and "apex" in kernel_speed.row_line(rows[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--batch", "0"], "at least 1"), (["--ops", "geglo"], "geglo"), (["--dtype", "x"], "x")],
)
def test_options_that_make_no_sense(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        parse(arguments)
    assert leaving.value.code == 2
    assert message in capsys.readouterr().err


def test_no_such_case_and_no_gpu_are_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for arguments in (["--cases", "none such"], []):
        assert kernel_speed.main(arguments) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1
    assert kernel_speed.main(["--dry", "--ops", "geglu"]) == 0
    assert "2013 MB forward and 3355 MB backward" in capsys.readouterr().out


def test_a_bare_checkout_is_enough() -> None:
    root = Path(kernel_speed.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root / "kernels")}
    command = [sys.executable, "-m", "benchmarks.kernel_speed", "--dry", "--quick"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr


def test_few_small_cases_are_the_first_and_the_heaviest() -> None:
    few = small_cases(geglu.SPEC, "triton", torch.bfloat16, few=True)
    every = small_cases(geglu.SPEC, "triton", torch.bfloat16)
    assert every == list(geglu.SPEC.small_cases) and few[0] == every[0] and len(few) == 2
    weights = [geglu.SPEC.work(case, torch.bfloat16).forward_bytes for case in every]
    assert geglu.SPEC.work(few[1], torch.bfloat16).forward_bytes == max(weights)
    verdict = ParityChecker("cpu", few=True, own=False).check(
        candidate("triton"), geglu.SPEC.backend("triton").function("geglu")
    )
    assert verdict["ok"] and 0 < verdict["checked"] < 20


def test_a_plan_without_compiled_references() -> None:
    backends = {item.backend for item in plan(H100, heaviest_only=True, compiled=False)}
    assert COMPILED not in backends and "triton" in backends
