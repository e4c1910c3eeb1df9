"""A Slurm of canned answers: programs on PATH that print what Slurm's would."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.small_run import TREE


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TREE))
    return path


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """fake_slurm(gpus=(8, 8), host=...) -> file of the commands that sbatch was called with."""

    def make(
        gpus: tuple[int, ...] = (8, 8), host: str = platform.node(), help: str = "", fault: str = ""
    ) -> Path:
        lines = [
            f"NodeName=n{number} Gres={f'gpu:h100:{count}(S:0-1)' if count else '(null)'} "
            f"NodeAddr=10.0.0.{number} NodeHostName={host} Partitions=main,all"
            for number, count in enumerate(gpus, 1)
        ]
        folder, submitted = tmp_path / "bin", tmp_path / "submitted"
        folder.mkdir()
        submit = f"echo \"$0 $*\" >> '{submitted}'; echo $(wc -l < '{submitted}')"
        if fault:
            submit = f"echo 'sbatch: error: {fault}' >&2; exit 1"
        programs = {
            "scontrol": "\n".join(f"echo '{line}'" for line in lines),
            "sinfo": 'case "$*" in *%P*) echo "main* all";; *) echo 1-00:00:00;; esac',
            "srun": f"echo '{help}'",
            "sbatch": submit,
        }
        for name, text in programs.items():
            (folder / name).write_text(f"#!/bin/bash\n{text}\n")
            (folder / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        return submitted

    return make
