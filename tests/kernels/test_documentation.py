"""The op that docs/kernels.md writes from nothing is one."""

from __future__ import annotations

import importlib
import json
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


@pytest.mark.slow
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


WHOLE_HOUSE = """
import json, sys
import sd_kernels
sd_kernels.__path__.append(sys.argv[1])
from dataclasses import replace
from sd_kernels.registry import all_ops
from sd_kernels.selection import choose
from sd_kernels.targets import GPUS
from sd_perf.config import Config, KernelsConfig, UNetConfig
from sd_perf.errors import ConfigError
from sd_perf.presets import config_from_dict, load_preset
from sd_perf.tools.doctor import examine
from sd_perf.tools.estimate.dry_run import dry_run
from sd_perf.tools.estimate.predict import predict
from sd_perf.tools.parity.operators import compare_operators
from sd_perf.tools.parity.parity_case import ParityCase

smoke = load_preset(sys.argv[2])
named = config_from_dict({"kernels": {"squared_relu": "reference"}}).kernels
fast = replace(smoke, model=replace(smoke.model, implementation="fast"))
try:
    config_from_dict({"kernels": {"squared_rely": "auto"}})
except ConfigError as error:
    typo = str(error)
[doctored] = [row for row in examine("h100")["kernels"] if row["op"] == "squared_relu"]
facts = {
    "key": [KernelsConfig().squared_relu, named.squared_relu, typo],
    "auto": choose("squared_relu", target=GPUS["h100"].target).backend,
    "dry run": dry_run(fast, 1, "h100")["kernels"]["squared_relu"]["backend"],
    "doctor": doctored["auto"],
    "estimate": predict(smoke, "h100", 2)["by_op"]["squared_relu"],
}
case = ParityCase.of(fast, "interpreter")
assert case.choices["squared_relu"].backend == "triton"
case.ops  # made of all
for op in all_ops().keys() - {"squared_relu"}:  # the others have tests of their own
    del all_ops()[op]
facts["parity"] = {f"{row.name} {row.dtype}": row.ok for row in compare_operators(case)}
print(json.dumps(facts))
"""


@pytest.mark.slow
def test_the_documented_op_goes_through_the_whole_house(tmp_path: Path) -> None:
    write_op(tmp_path)
    smoke = ROOT / "configs/smoke.yaml"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    command = [sys.executable, "-c", WHOLE_HOUSE, str(tmp_path), str(smoke)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    facts = json.loads(result.stdout)
    default, named, typo = facts["key"]
    assert (default, named) == ("auto", "reference")
    assert typo == "kernels.squared_rely: unknown key; did you mean kernels.squared_relu?"
    assert facts["auto"] == facts["dry run"] == facts["doctor"] == "triton"
    # 16-bit numbers of a sample: two moved forward, three backward, in a kernel each.
    smoke_side, smoke_channels = 8, 64
    numbers = smoke_side**2 * 4 * smoke_channels
    assert facts["estimate"]["gigabytes"] == pytest.approx(5 * 2 * numbers / 1e9)
    assert facts["estimate"]["kernels"] == 2
    dtypes = ("float32", "bfloat16")
    assert facts["parity"] == {f"squared_relu (triton) {dtype}": True for dtype in dtypes}


def test_the_page_names_what_there_is() -> None:
    paths = set(re.findall(r"`((?:benchmarks|kernels|tests|sd_perf)/[\w/]+\.(?:py|md))`", PAGE))
    assert paths
    missing = {path for path in paths if "squared_relu" not in path and not (ROOT / path).exists()}
    assert not missing
