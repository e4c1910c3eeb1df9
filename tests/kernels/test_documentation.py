"""The op that docs/kernels.md writes from nothing is one."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

import sd_kernels
from sd_kernels import harness
from sd_kernels.registry import all_ops
from sd_kernels.spec import OpSpec

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")


def write_op(folder: Path) -> None:
    """Every file that the page names before a block of Python."""
    for before, after in pairwise(PAGE.split("```python\n")):
        path = folder / re.findall(r"`kernels/sd_kernels/(squared_relu/\w+\.py)`", before)[-1]
        path.parent.mkdir(exist_ok=True)
        path.write_text(after.partition("```")[0], encoding="utf-8")


@pytest.fixture
def documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OpSpec]:
    write_op(tmp_path)
    all_ops()  # kept for other tests, which know nothing of this op
    monkeypatch.setattr(sd_kernels, "__path__", [*sd_kernels.__path__, str(tmp_path)])
    yield importlib.import_module("sd_kernels.squared_relu").SPEC
    for name in [name for name in sys.modules if name.startswith("sd_kernels.squared_relu")]:
        del sys.modules[name]


def test_the_documented_op_is_right(documented: OpSpec, device: str) -> None:
    for case in documented.small_cases:
        for dtype in documented.dtypes:
            verdicts = harness.check(documented, "triton", case, dtype, device)
            assert {verdict.output for verdict in verdicts} == {"y", "grad x"}
            assert all(verdict.ok for verdict in verdicts), "\n".join(map(str, verdicts))


def test_the_documented_op_compiles_for_hopper(tmp_path: Path) -> None:
    write_op(tmp_path)
    script = (
        f"import sd_kernels; sd_kernels.__path__.append({str(tmp_path)!r}); from benchmarks "
        "import ahead_of_time as a; "
    )
    script += "import sys; sys.argv = ['', '--ops', 'squared_relu', '--targets', '90']; "
    script += "sys.exit(a.main())"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 of 2 specialisations green" in result.stdout


def test_the_page_names_what_there_is() -> None:
    paths = set(re.findall(r"`((?:benchmarks|kernels|tests|sd_perf)/[\w/]+\.(?:py|md))`", PAGE))
    assert paths
    missing = {path for path in paths if "squared_relu" not in path and not (ROOT / path).exists()}
    assert not missing
