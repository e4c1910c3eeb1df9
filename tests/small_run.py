"""A run small enough for a unit test, and ways to run it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from sd_kernels.spec import Target
from sd_perf.cli import main
from sd_perf.config import Config
from sd_perf.distributed.world import start_world
from sd_perf.fast.choice import choose_kernels
from sd_perf.presets import config_from_dict
from sd_perf.runs.checkpoints import CheckpointStore
from sd_perf.runs.folder import open_run
from sd_perf.training.launch import build_trainer
from sd_perf.training.trainer import Trainer
from tests.waiting import PATIENCE

TREE = {
    "model": {
        "model_channels": 32,
        "channel_mult": [1, 2],
        "num_res_blocks": 1,
        "attention_resolutions": [2],
        "num_head_channels": 32,
        "context_dim": 16,
    },
    "data": {"format": "synthetic", "latent_size": 8, "context_tokens": 3},
    "optimizer": {"base_learning_rate": 1.0e-4, "warmup_steps": 10},
    "training": {
        "global_batch_size": 4,
        "max_samples": 200,
        "precision": "fp32",
        "device": "cpu",
        "seed": 0,
    },
    "checkpoint": {"every_samples": 40},
    "logging": {"every_steps": 5},
}


def small_config(folder: Path, **changes: dict) -> Config:
    """The small run in this folder, with keys changed: training={...}, ..."""
    tree = {
        section: {**TREE.get(section, {}), **changes.get(section, {})}
        for section in {**TREE, **changes}
    }
    return config_from_dict({**tree, "run": {"dir": str(folder)}})


def small_trainer(config: Config, callbacks: list | None = None, resume: bool = False) -> Trainer:
    """A trainer in this process, at sample 0 or at the newest checkpoint."""
    settled, choices = open_run(config, resume=resume), choose_kernels(config, Target.here())
    newest = CheckpointStore(Path(config.run.dir) / "checkpoints").newest() if resume else None
    world = start_world("cpu")
    trainer = build_trainer(settled, world, choices, callbacks or [], newest is None)
    if newest:
        trainer.load(newest)
    return trainer


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., Config]:
    """make_config(name, training={...}, ...): the small run in tmp_path/name with keys changed."""

    def make(name: str = "run", **changes: dict) -> Config:
        return small_config(tmp_path / name, **changes)

    return make


@pytest.fixture
def make_trainer() -> Callable[..., Trainer]:
    """See `small_trainer`."""
    return small_trainer


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    """The small run as a YAML preset."""
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TREE))
    return path


def train_here(preset: Path, run: Path, *options: str) -> None:
    """`sd-perf train` in this process, for fixtures that need no more than what a run leaves."""
    with pytest.raises(SystemExit) as left:
        main(["train", "--config", str(preset), "--run.dir", str(run), *options])
    assert left.value.code == 0


def start_train(preset: Path, run: Path, *options: str, processes: int = 1) -> subprocess.Popen:
    """`sd-perf train` in a process of its own (or several under torchrun), with its output
    piped."""
    launcher = [sys.executable, "-m", "sd_perf"]
    if processes > 1:
        launcher = [*torchrun(processes, preset.parent), "-m", "sd_perf"]
    command = [*launcher, "train", "--config", str(preset), "--run.dir", str(run), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def torchrun(processes: int, folder: Path) -> list[str]:
    """torchrun of this machine, which keeps its own files below a folder."""
    options = ["--standalone", "--nproc-per-node", str(processes)]
    logs = ["--log-dir", str(folder / "torchrun")]
    return [sys.executable, "-m", "torch.distributed.run", *options, *logs]


def train(preset: Path, run: Path, *options: str, processes: int = 1, code: int = 0) -> str:
    """Run to the end and return what it printed; the exit code is checked."""
    process = start_train(preset, run, *options, processes=processes)
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, (process.returncode, output, errors)
    return output + errors
