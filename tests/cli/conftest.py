"""A short preset, and the runs that tests of bad input spoil."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cli.bad_input import (
    newest,
    write_preset,
)
from tests.small_run import train_here


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    return write_preset(tmp_path / "tiny.yaml")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return tmp_path / "shards"


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory) -> Path:
    """A run of two steps, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("whole")
    train_here(write_preset(folder / "tiny.yaml"), folder / "run")
    return folder / "run"


@pytest.fixture(scope="session")
def other_checkpoint(tmp_path_factory) -> Path:
    """A checkpoint of another model on the same data."""
    folder = tmp_path_factory.mktemp("other")
    train_here(write_preset(folder / "other.yaml", model={"channel_mult": [1, 1]}), folder / "run")
    return newest(folder / "run")


@pytest.fixture
def copied_run(whole_run: Path, run: Path) -> Path:
    shutil.copytree(whole_run, run)
    return run
