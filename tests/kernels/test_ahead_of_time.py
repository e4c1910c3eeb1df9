"""Kernels compiled for GPUs that are not here; in child processes, since the interpreter is chosen
at import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
OLDEST = ROOT / ".venv/triton-3.6"
"""the oldest Triton that is supported, unpacked there by `make test-all`"""

needs_oldest = pytest.mark.skipif(
    not (OLDEST / "triton").is_dir(), reason=f"no {OLDEST}; make test-all unpacks it"
)
VERSIONS = [
    pytest.param("installed", marks=pytest.mark.slow),
    pytest.param("oldest", marks=[pytest.mark.slow, needs_oldest]),
]


def run(
    module: str, *arguments: str, triton: str = "installed"
) -> subprocess.CompletedProcess[str]:
    """A module of the checkout without Triton's interpreter; whatever it warns of is an error."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if triton == "oldest":
        environment["PYTHONPATH"] = os.pathsep.join(
            filter(None, [str(OLDEST), environment.get("PYTHONPATH")])
        )
    command = [sys.executable, "-m", module, *arguments]
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )
    assert "warn" not in result.stderr.lower(), result.stderr
    return result


@pytest.fixture(scope="module", params=VERSIONS)
def judged(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What the check says of each kernel of ahead_of_time_faults.py, for an H100."""
    result = run("tests.kernels.ahead_of_time_faults", "90", triton=request.param)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("kernel", ["wide", "explained", "explained_in_a_helper", "product"])
def test_green(judged: dict[str, Any], kernel: str) -> None:
    assert judged[kernel]["ok"], judged[kernel]


@pytest.mark.parametrize(
    ("kernel", "line"),
    [
        ("narrow_store", "    tl.store(y + 3 * i, value)"),
        ("narrow_masked_loads", "    one = tl.load(x + 3 * i, mask=i < N - 1, other=1.0)"),
        ("explained_by_the_caller_of_a_helper", "    tl.store(y + 3 * tl.arange(0, N), value)"),
    ],
)
def test_a_narrow_access_is_red_at_its_own_line(
    judged: dict[str, Any], kernel: str, line: str
) -> None:
    assert not judged[kernel]["ok"]
    [place] = judged[kernel]["narrow_lines"]
    number = int(place.partition(":")[2].split()[0])
    source = (ROOT / "tests/kernels/ahead_of_time_faults.py").read_text().splitlines()
    assert source[number - 1] == line


def test_a_stack_and_spills_are_red(judged: dict[str, Any]) -> None:
    row = judged["too_many_registers"]
    assert not row["ok"] and row["stack_bytes"] > 0 and row["spills"] > 0


def test_a_product_without_tensor_cores_is_red(judged: dict[str, Any]) -> None:
    row = judged["product_without_tensor_cores"]
    assert not row["ok"] and row["matrix"] == "missing"
    assert judged["product"]["matrix"] == "HGMMA"


@pytest.mark.slow
@pytest.mark.parametrize("op", ["v_mse_loss", "geglu", "average"])
def test_an_op_for_hopper(op: str) -> None:
    result = run("benchmarks.ahead_of_time", "--ops", op, "--targets", "90")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.longest
@pytest.mark.parametrize("triton", VERSIONS)
def test_all_ops_for_all_targets(triton: str, tmp_path: Path) -> None:
    # By the oldest Triton for one of the targets: all of them take a quarter of an hour.
    targets = ["--targets", "90"] if triton == "oldest" else []
    table = tmp_path / "table.md"
    result = run("benchmarks.ahead_of_time", *targets, "--markdown", str(table), triton=triton)
    red = [line for line in result.stdout.splitlines() if line.startswith("RED")]
    assert not red, red
    assert result.returncode == 0, result.stdout + result.stderr
    assert ("triton 3.6" in result.stdout) == (triton == "oldest")
    first = "sm_90" if triton == "oldest" else "sm_80"
    assert table.read_text().startswith(f"| kernel | registers {first} |")


def test_the_interpreter_is_refused() -> None:
    command = [sys.executable, "-m", "benchmarks.ahead_of_time", "--ops", "geglu"]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert result.returncode == 2 and "TRITON_INTERPRET is set" in result.stderr
