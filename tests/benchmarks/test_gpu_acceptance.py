"""The whole acceptance run on a CPU, with parts that are made up: no number is a result."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import attempts, gpu_acceptance
from benchmarks.attempts import run_child
from benchmarks.checks import Check, make_check
from benchmarks.gpu_acceptance import ENVIRONMENT, Run
from benchmarks.gpu_checks import PICTURES, full_network, small_network
from benchmarks.gpu_device import Device
from benchmarks.gpu_fast import FAST_BF16
from benchmarks.gpu_parts import PARTS, Part
from benchmarks.gpu_report import Report, nothing_yet, source_digest
from benchmarks.gpu_throughput import ThroughputRow, TimedRecipe, make_row
from benchmarks.gpu_workload import AUTOCAST
from benchmarks.kernel_cases import plan
from benchmarks.kernel_speed import make_row as make_kernel_row
from benchmarks.timing import Budget
from sd_kernels.targets import GPUS
from sd_perf.errors import UserError
from sd_perf.tools.results import KernelRow, Provenance, read
from tests.benchmarks.tiny import H100, THROUGHPUT
from tests.waiting import PATIENCE, wait_for

ROOT = Path(__file__).parents[2]
STAND_INS = "tests.benchmarks.stand_in_parts"
TITLES = [group.title for group in (*small_network(Device()), *full_network(Device()))]
GREEN = [make_check("draws", 0.0, 0.0)]


def part(name: str, most: float = PATIENCE, least: float = 0.0) -> Part:
    return Part(name, lambda job: [], aim=10.0, most=most, item_most=10.0, least=least)


def run(
    folder: Path, *names: str | Part, seconds: float = 10 * PATIENCE, earlier: Path | None = None
) -> Report:
    """The report of stand-in parts of these names."""
    options = gpu_acceptance.parse(["--output", str(folder)])
    options.earlier = earlier
    parts = [each if isinstance(each, Part) else part(each) for each in (ENVIRONMENT, *names)]
    options.parts = [each.name for each in parts]
    provenance = Provenance("2026-01-01", "command", "abc", machine={}, versions={})
    scratch = folder / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    report = Report(folder, provenance, source_digest())
    Run(parts, options, Budget(seconds), report, scratch, module=STAND_INS).all_parts()
    return report


def timed_rows() -> list[ThroughputRow]:
    """A fast row and a plain row, as they were timed."""
    entries = [TimedRecipe(recipe, 64, graph=True) for recipe in (FAST_BF16, AUTOCAST)]
    rows = [make_row(H100, entry, THROUGHPUT) for entry in entries]
    rows[0]["kernels"] = {"geglu": "triton", "linear": "torch", "conv": "reference"}
    return rows


def kernel_rows(ok: bool = True) -> list[KernelRow]:
    """Measured rows of the kernels that the fast row runs."""
    machine = {"gpu": H100, "torch": "2", "triton": "3", "copy_gb_per_second": 1.0}
    measured = {"status": "measured", "us": 1.0, "gb_per_second": 1.0, "percent_of_copy": 1.0}
    parity = {"ok": ok, "checked": 1, "worst": ""}
    return [
        make_kernel_row(machine, each, "forward", {**measured, "parity": parity})
        for each in plan(GPUS["h100"].target, ["geglu", "linear"], heaviest_only=True)
    ]


def report_of(
    folder: Path,
    checks: list[Check] = GREEN,
    groups: list[str] = TITLES,
    kernels: list[KernelRow] | None = None,
) -> Report:
    """A report with two timed rows and what they rest on."""
    provenance = Provenance("2026-01-01", "command", "abc", {"gpu": H100}, versions={"torch": "2"})
    report = Report(folder, provenance, source_digest())
    found: Any = {**nothing_yet("fast", "done"), "rows": timed_rows(), "checks": checks}
    found |= {"finished": groups, "kernels": kernel_rows() if kernels is None else kernels}
    report.put(found)
    return report


@pytest.fixture
def up_when_it_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of the part `hangs` is up when it hangs, and not before."""

    def monotonic() -> float:
        findings = [path.read_text() for path in tmp_path.glob("**/scratch/hangs.json")]
        return 2 * PATIENCE * any('"current": "two"' in each for each in findings)

    monkeypatch.setattr(attempts, "time", SimpleNamespace(monotonic=monotonic))


@pytest.mark.usefixtures("up_when_it_hangs")
def test_what_goes_wrong_costs_its_part_alone(tmp_path: Path) -> None:
    names = ("raises", "crashes", "hangs", "breaks", "fine")
    report = run(tmp_path, *names)
    ends = {name: (found["status"], found["finished"]) for name, found in report.parts.items()}
    every = ["one", "two", "three"]
    assert ends == {
        ENVIRONMENT: ("done", every),
        "raises": ("failed", []),
        "crashes": ("done", every),  # in a second process, without the item that crashed
        "hangs": ("timed out", ["one", "two"]),
        "breaks": ("done", every),
        "fine": ("done", every),
    }
    assert report.parts["raises"]["reason"] == "ended with exit code 1"
    assert report.parts["crashes"]["broken"] == {"two": "ended by SIGSEGV"}
    assert report.parts["hangs"]["broken"]["two"].startswith("killed after")
    assert "illegal memory access" in report.parts["breaks"]["broken"]["two"]
    assert [line.split()[1] for line in report.failures()] == [
        "raises",
        "crashes",
        "hangs",
        "breaks",
    ]
    text = report.summary()
    assert f"{H100}, torch 2" in text and "FAILED part hangs" in text
    written = read(tmp_path / "gpu_acceptance.json", "gpu_acceptance", ThroughputRow)
    assert written == report.result()
    assert {path.name for path in tmp_path.iterdir()} == {"gpu_acceptance.json", "scratch"}


def test_without_a_gpu_nothing_else_runs(tmp_path: Path) -> None:
    provenance = Provenance("2026-01-01", "command", "abc", machine={}, versions={})
    report = Report(tmp_path, provenance, source_digest())
    options = gpu_acceptance.parse(["--output", str(tmp_path)])
    parts = [part(ENVIRONMENT), part("fine")]
    options.parts = [ENVIRONMENT, "fine"]
    missing = "tests.benchmarks.no_such_module"
    Run(parts, options, Budget(60), report, tmp_path, module=missing).all_parts()
    assert list(report.parts) == [ENVIRONMENT]
    assert report.parts[ENVIRONMENT]["status"] == "failed"
    assert "no GPU to be seen" in report.notes[0]
    assert report.failures()


@pytest.mark.usefixtures("up_when_it_hangs")
def test_the_second_call_goes_on(tmp_path: Path) -> None:
    first = run(tmp_path / "a", "fine", "hangs", part("late", least=20 * PATIENCE))
    assert first.parts["late"]["status"] == "left out"
    assert not any("late" in line for line in first.failures())
    earlier = tmp_path / "a/gpu_acceptance.json"
    second = run(tmp_path / "b", "fine", "hangs", "late", earlier=earlier)
    assert second.parts["fine"] == first.parts["fine"]
    # The item that hung is not begun again.
    assert second.parts["hangs"]["status"] == "done"
    assert second.parts["hangs"]["broken"] == first.parts["hangs"]["broken"]
    assert second.parts["late"]["finished"] == ["one", "two", "three"]
    # What the first call spent is counted in.
    assert second.parts["hangs"]["seconds"] >= first.parts["hangs"]["seconds"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data["details"].update(source="x"), "its sources were others"),
        (lambda data: data["provenance"]["machine"].update(gpu="A"), "it is of A, this is NVIDIA"),
        (lambda data: data["provenance"]["versions"].update(torch="1"), "its software was"),
    ],
)
def test_another_earlier_report_does_not_count(change: Any, reason: str, tmp_path: Path) -> None:
    run(tmp_path / "a", "fine")
    earlier = tmp_path / "a/gpu_acceptance.json"
    data = json.loads(earlier.read_text())
    data["details"]["parts"]["fine"]["finished"] = ["something else"]
    change(data)
    earlier.write_text(json.dumps(data))
    report = run(tmp_path / "b", "fine", earlier=earlier)
    assert report.parts["fine"]["finished"] == ["one", "two", "three"]
    assert reason in report.notes[0]


def test_a_damaged_earlier_report_is_one_sentence(tmp_path: Path) -> None:
    earlier = tmp_path / "earlier.json"
    earlier.write_text("{}")
    with pytest.raises(UserError, match=r"is no result of gpu_acceptance\.py"):
        run(tmp_path / "b", "fine", earlier=earlier)


def test_what_is_proven_is_measured(tmp_path: Path) -> None:
    report = report_of(tmp_path)
    assert [row["status"] for row in report.rows] == ["measured", "measured"]
    assert report.failures() == []
    assert "24.4%" in report.summary() and "not to be quoted" not in report.summary()
    rows = read(tmp_path / "kernels_nvidia_h100_80gb_hbm3.json", "kernel_speed", KernelRow).rows
    assert rows == report.kernels


@pytest.mark.parametrize(
    ("changed", "fast", "plain"),
    [
        ({"groups": TITLES[:-2]}, "fast_bf16: a step of the full network (not checked yet)", None),
        ({"kernels": []}, "kernel geglu, triton (not compared yet)", None),
        ({"kernels": kernel_rows(ok=False)}, "kernel geglu, triton", None),
        ({"checks": [make_check("draws", 1.0, 0.0)]}, "draws", "draws"),
        (
            {"checks": [make_check("output", 1.0, 0.0, recipe="fast_bf16")]},
            "fast_bf16: output",
            None,
        ),
        ({"checks": [make_check("pixels", 1.0, 0.0, recipe=PICTURES)]}, None, None),
    ],
)
def test_the_unproven_is_kept_and_marked(
    changed: dict[str, Any], fast: str | None, plain: str | None, tmp_path: Path
) -> None:
    report = report_of(tmp_path, **changed)
    for row, reason in zip(report.rows, (fast, plain), strict=True):
        assert row["status"] == ("unproven" if reason else "measured")
        assert row["reason"] == (f"unproven: {reason}" if reason else None)
        assert row["samples_per_second"] == 100.0
    [line] = [line for line in report.summary().splitlines() if "fast_bf16  " in line]
    assert line.endswith(f"unproven: {fast}: not to be quoted") == bool(fast)
    # What is in the parts is as it was timed, so that a later call can prove it.
    data = json.loads((tmp_path / "gpu_acceptance.json").read_text())
    assert {row["status"] for row in data["details"]["parts"]["fast"]["rows"]} == {"measured"}
    assert data["rows"][0]["status"] == ("unproven" if fast else "measured")


def test_a_child_is_killed_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note, ticks = tmp_path / "pid", []
    script = f"sleep 1000 & echo $! > {note}; wait"

    def monotonic() -> float:
        """The time is up when the child has started what it starts."""
        return 20.0 if note.is_file() and note.read_text() else 0.0

    monkeypatch.setattr(attempts, "time", SimpleNamespace(monotonic=monotonic))
    nothing: Any = {"folder": tmp_path, "environment": os.environ}
    ended = run_child(["bash", "-c", script], 20.0, **nothing, tick=lambda: ticks.append(1))
    assert ended == ("timed out", "killed after 20 s", 20.0, None) and ticks
    grandchild = Path(f"/proc/{int(note.read_text())}/stat")
    wait_for(lambda: not grandchild.exists() or grandchild.read_text().split()[2] == "Z")


def test_an_end_has_a_reason(tmp_path: Path) -> None:
    def ended(script: str) -> Any:
        nothing = {"folder": tmp_path, "environment": os.environ, "tick": lambda: None}
        return run_child([sys.executable, "-c", script], PATIENCE, **nothing)

    assert ended("")[:2] == ("done", None)
    assert ended("raise SystemExit(75)")[:2] == ("failed", "ended with exit code 75")
    assert ended("raise SystemExit(75)").code == 75
    killed = f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})"
    assert ended(killed)[:2] == ("failed", "ended by SIGKILL")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "x"], "invalid int value"),
        (["--batch", "0"], "at least 1"),
        (["--rival-batch", "0"], "at least 1"),
        (["--parts", "speed"], "no part is called 'speed'"),
        (["--earlier", "/no/such/file"], "/no/such/file: there is no such file"),
        (["--triton-cache", "/no/such/file"], "there is no such file"),
    ],
)
def test_options_that_make_no_sense(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as leaving:
        gpu_acceptance.parse(["--output", str(tmp_path), *arguments])
    assert leaving.value.code == 2
    assert message in capsys.readouterr().err


def test_a_tree_without_a_commit_is_refused_before_anything_is_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    unknown = Provenance("2026-01-01", "command", None, machine={}, versions={})
    monkeypatch.setattr(Provenance, "of_this_run", lambda *_: unknown)
    arguments = ["--output", str(tmp_path / "out"), "--rehearse"]
    assert gpu_acceptance.main(arguments) == 2
    assert "give --git-sha" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_parts_are_in_the_order_of_their_worth() -> None:
    names = [each.name for each in PARTS]
    first = "environment triton_cache kernels convolutions fast profile small_network full_network"
    assert names[:8] == first.split()
    # What the first call is for fits into it, with time to spare for starts of processes.
    assert sum(each.aim for each in PARTS[:7]) < 440 < 540
    assert all(each.aim <= each.most and each.item_most <= each.most for each in PARTS)


@pytest.mark.slow
def test_the_command_rehearses_itself(tmp_path: Path) -> None:
    """The command and one real part, each in its own process."""
    command = [sys.executable, "-m", "benchmarks.gpu_acceptance", "--output", str(tmp_path)]
    command += ["--rehearse", "--parts", ENVIRONMENT, "--git-sha", "abc"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "part environment     done" in result.stdout
    written = read(tmp_path / "gpu_acceptance.json", "gpu_acceptance", ThroughputRow)
    assert written.details["parts"][ENVIRONMENT]["finished"] == ["description", "ceilings"]
    assert written.provenance.machine["gpu"].startswith("rehearsal")
    assert not written.rows


@pytest.mark.slow
def test_the_whole_rehearsal(tmp_path: Path) -> None:
    """Every part that a GPU will run, but for torch.compile, on tiny networks."""
    parts = ",".join(each.name for each in PARTS if each.name != "compiled")
    command = [sys.executable, "-m", "benchmarks.gpu_acceptance", "--output", str(tmp_path)]
    command += ["--rehearse", "--batch", "2", "--rival-batch", "2", "--parts", parts]
    command += ["--git-sha", "abc"]
    # As on a GPU machine; the interpreter's kernels cannot be compiled.
    environment = {**os.environ}
    environment.pop("TRITON_INTERPRET", None)
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = read(tmp_path / "gpu_acceptance.json", "gpu_acceptance", ThroughputRow).rows
    # A CPU has no Triton: the convolution that it takes instead is not among those compared.
    taken = "unproven: kernel upsample_conv, merged (not compared yet)"
    assert {row["reason"] for row in rows if row["status"] == "unproven"} <= {taken}
    assert {row["status"] for row in rows} <= {"measured", "absent", "unproven"}


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
    "fsspec", "optree",
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


@pytest.mark.slow
def test_torch_triton_and_numpy_are_enough() -> None:
    command = [sys.executable, "-E", "-c", BLOCKED_IMPORTS]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
