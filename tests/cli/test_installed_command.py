"""The command as users start it, in a process of its own: one case of each kind of bad input."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.conftest import only_sentence

ROOT = Path(__file__).parents[2]
SCRIPT = Path(sysconfig.get_path("scripts")) / "sd-perf"
HERE = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}


def start(*arguments: object, program: tuple[object, ...]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in (*program, *arguments)],
        env={**os.environ, **HERE},
        capture_output=True,
        text=True,
        timeout=120,
    )


def run_folder(folder: Path) -> list[object]:
    (folder / "run").mkdir()
    (folder / "run/run_manifest.json").write_text("[" * 100_000)
    return ["verify", folder / "run"]


def config(folder: Path) -> list[object]:
    (folder / "c.yaml").write_text("training: {}\ntraining: {}\n")
    return ["estimate", "--config", folder / "c.yaml"]


def pipe(folder: Path) -> list[object]:
    os.mkfifo(folder / "c.yaml")
    return ["train", "--config", folder / "c.yaml"]


def long_name(folder: Path) -> list[object]:
    return ["export", "--source", "x" * 300, "--output", folder / "out"]


def control_characters(folder: Path) -> list[object]:
    return ["report", folder / "\x1b[31mno\nrun"]


def data(folder: Path) -> list[object]:
    preset = ROOT / "configs/smoke.yaml"
    return ["data", "verify", "--config", preset, "--data.path", folder / "absent"]


def log(folder: Path) -> list[object]:
    return ["mlperf", "check", folder]


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "case", [run_folder, config, pipe, long_name, control_characters, data, log]
)
def test_one_sentence(case, tmp_path):
    done = start(*case(tmp_path), program=(sys.executable, "-m", "sd_perf"))
    assert done.returncode == 2, done.stderr
    assert only_sentence(done.stderr).isprintable() and not done.stdout


def test_the_console_script(tmp_path):
    if not SCRIPT.exists():
        pytest.skip("sd-perf is not installed")
    done = start(*config(tmp_path), program=(SCRIPT,))
    assert done.returncode == 2
    assert "training" in only_sentence(done.stderr)
