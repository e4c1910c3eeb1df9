"""The Makefile's way to a virtual environment, and what `make train` asks first."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def recipe(folder: Path, target: str) -> list[str]:
    """The commands that make would run for a target of the Makefile, in a folder that has nothing
    but what `data` leaves."""
    shutil.copy(ROOT / "Makefile", folder)
    shutil.copy(ROOT / "pyproject.toml", folder)
    command = ["make", "-n", target, f"PYTHON={sys.executable}"]
    # Tests run under make themselves: its flags and level would change what this one prints.
    of_make = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")
    env = {name: value for name, value in os.environ.items() if name not in of_make}
    text = subprocess.run(
        command, cwd=folder, env=env, capture_output=True, text=True, check=True
    ).stdout
    return text.replace("\\\n", " ").splitlines()


def test_an_unfinished_run_is_looked_for_before_parity(tmp_path):
    commands = recipe(tmp_path, "train")
    places = {
        word: next(number for number, line in enumerate(commands) if f"sd-perf {word}" in line)
        for word in ("train", "parity", "evaluate")
    }
    assert places["train"] < places["parity"] < places["evaluate"]
    assert "--fresh --dry-run" in commands[places["train"]]


def nothing_yet(venv: Path) -> None:
    pass


def empty(venv: Path) -> None:
    venv.mkdir()


def python_alone(venv: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)


def half_of_pip(venv: Path) -> None:
    """Unpacked by the standard library's installer until it was interrupted."""
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    [pip] = venv.glob("lib/*/site-packages/pip")
    shutil.rmtree(pip / "_internal")


def link_to_nothing(venv: Path) -> None:
    """What is left when the Python that it was made of has been removed."""
    python_alone(venv)
    for link in venv.glob("bin/python*"):
        link.unlink()
        link.symlink_to("/nowhere/python")


@pytest.mark.slow
@pytest.mark.parametrize("make", [nothing_yet, empty, python_alone, half_of_pip, link_to_nothing])
def test_a_half_made_environment_is_completed(make, tmp_path):
    make(tmp_path / ".venv")
    command = recipe(tmp_path, "install")[0]
    assert "-m venv" in command
    subprocess.run(["sh", "-ec", command], cwd=tmp_path, check=True, capture_output=True)
    pip = [tmp_path / ".venv/bin/python", "-m", "pip", "--version"]
    assert subprocess.run(pip, capture_output=True).returncode == 0
    (tmp_path / ".venv/kept").touch()
    subprocess.run(["sh", "-ec", command], cwd=tmp_path, check=True)
    assert (tmp_path / ".venv/kept").exists()
