"""What every run of the soak has: the tiny world, the run never killed, and what a folder tells."""

from __future__ import annotations

import filecmp
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.command import python_path
from sd_perf.drafts import ASIDE
from sd_perf.errors import UserError
from sd_perf.runs.checkpoints import CheckpointStore, position
from sd_perf.tools.results import REPOSITORY

BATCH = 8
STEPS = 40
STEPS_PER_CHECKPOINT = 10
PROCESSES = 2
MARK = "SD_PERF_SOAK_RUN"
"""environment variable that all processes of a run have from its start"""
SUPERSEDED = "metrics.superseded.jsonl"


@dataclass(frozen=True)
class Look:
    """What a run folder tells at a moment. Positions are samples."""

    logged: int
    """steps that were ever logged, those taken again too"""
    superseded: int
    """steps of them that a resumed run set aside, to take them again"""
    trained: int
    """position of the last logged step"""
    saved: int
    """position of the newest complete checkpoint"""
    writing: frozenset[str]
    """unfinished checkpoints"""

    @classmethod
    def at(cls, run: Path) -> Look:
        """Read the folder, which may not be there yet."""
        lines, superseded = _lines(run / "metrics.jsonl"), len(_lines(run / SUPERSEDED))
        checkpoints = run / "checkpoints"
        complete = CheckpointStore(checkpoints).complete() if checkpoints.is_dir() else []
        saved = max(map(position, complete), default=0)
        return cls(
            len(lines) + superseded,
            superseded,
            lines[-1]["samples"] if lines else saved,
            saved,
            frozenset(path.name for path in checkpoints.glob(f"{ASIDE}*")),
        )


def _lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file that a process may be writing to, or may just have cut short."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


class World:
    """Data, preset and environment of all runs; `prepare` makes them."""

    def __init__(self, folder: Path, steps: int = STEPS) -> None:
        self.folder = folder
        self.end = BATCH * steps
        """position at which a run is done, samples"""
        self.preset = folder / "soak.yaml"
        self.reference = folder / "never_killed"
        """folder of the run that nothing killed"""
        self.start_up = self.training = self.rest = 0.0
        """seconds that the run never killed took to its first step, to its last, and from there"""

    def prepare(self) -> None:
        """Make data and preset. UserError where the folder is used already, or a command fails."""
        if self.folder.exists() and any(self.folder.iterdir()):
            raise UserError(f"--folder: {self.folder} is not empty; give a folder of its own")
        (self.folder / "temporary").mkdir(parents=True)
        self.preset.write_text(yaml.safe_dump(self._preset()))
        prompts, scenes = self.folder / "prompts", self.folder / "scenes"
        autoencoder = REPOSITORY / "assets/tiny/autoencoder.safetensors"
        self._data("scenes", "--output", prompts, "--samples", 8, "--seed", 3)
        self._data("scenes", "--output", scenes, "--samples", 128, "--seed", 1, "--shards")
        config = ("--config", self.preset, "--images")
        self._data("statistics", *config, prompts)
        self._data("prepare", *config, scenes, "--autoencoder", autoencoder)

    def _data(self, *words: object) -> None:
        command = [sys.executable, "-m", "sd_perf", "data", *map(str, words)]
        done = subprocess.run(
            command, cwd=REPOSITORY, env=self.environment(), capture_output=True, text=True
        )
        if done.returncode:
            raise UserError(f"the tiny world cannot be made: {done.stderr.strip()[-500:]}")

    def environment(self, mark: Path | None = None) -> dict[str, str]:
        """Variables of the processes of a run, which `mark` tells from others."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
        return {
            **kept,
            "OMP_NUM_THREADS": "1",
            "PYTHON": sys.executable,
            "PYTHONPATH": python_path(),
            "TMPDIR": str(self.folder / "temporary"),
            **({MARK: str(mark)} if mark else {}),
        }

    def _preset(self) -> dict[str, Any]:
        """The smoke preset: a smaller network, every step logged, so that a kill is located."""
        small = {"model_channels": 32, "attention_resolutions": [2]}
        samples = {"max_samples": self.end, "global_batch_size": BATCH, "cpu_threads": 1}
        return {
            "extends": str(REPOSITORY / "configs/smoke.yaml"),
            "model": small,
            "data": {"path": str(self.folder / "moments")},
            "training": samples,
            "optimizer": {"decay_steps": 0, "warmup_steps": 4},
            "checkpoint": {"every_samples": STEPS_PER_CHECKPOINT * BATCH},
            "logging": {"every_steps": 1},
            "sampling": {"steps": 2},
            "evaluation": {
                "prompts": str(self.folder / "prompts/captions.jsonl"),
                "num_prompts": 8,
                "statistics": str(self.folder / "statistics.npz"),
            },
            "mlperf": {"division": "none"},
        }

    def equal(self, run: Path) -> dict[str, bool]:
        """Whether weights with their moments, losses and scores are those of the run never killed:
        bit by bit, at every checkpoint, step and score."""
        ours, theirs = (CheckpointStore(each / "checkpoints") for each in (run, self.reference))
        names = [path.name for path in theirs.complete()]
        return {
            "weights_equal": [path.name for path in ours.complete()] == names
            and all(
                _is_same(run / "checkpoints" / n, self.reference / "checkpoints" / n) for n in names
            ),
            "losses_equal": _columns(run / "metrics.jsonl", "samples", "loss")
            == _columns(self.reference / "metrics.jsonl", "samples", "loss"),
            "scores_equal": _columns(run / "scores.jsonl", "samples", "fid", "clip")
            == _columns(self.reference / "scores.jsonl", "samples", "fid", "clip"),
        }

    def left_over(self, run: Path) -> list[str]:
        """Files of a finished run that the one never killed has not."""
        return sorted(_files(run) - _files(self.reference) - {SUPERSEDED})


def _files(run: Path) -> set[str]:
    return {path.relative_to(run).as_posix() for path in run.rglob("*")}


def _columns(path: Path, *names: str) -> list[list[Any]]:
    return sorted([line[name] for name in names] for line in _lines(path))


def _is_same(ours: Path, theirs: Path) -> bool:
    """Whether two checkpoints have the same tensors, bit by bit."""
    names = sorted(path.name for path in theirs.glob("*.safetensors"))
    if not names or names != sorted(path.name for path in ours.glob("*.safetensors")):
        return False
    return not any(filecmp.cmpfiles(ours, theirs, names, shallow=False)[1:])


@dataclass(frozen=True)
class Process:
    """A living process of a run."""

    number: int
    words: tuple[str, ...]
    """its command line"""
    variables: frozenset[str]
    """names in the environment that it began with"""

    @property
    def name(self) -> str:
        """What it is, in words."""
        return " ".join(Path(word).name if "/" in word else word for word in self.words[:6])

    def is_rank(self) -> bool:
        """Whether it trains, or scores what was trained; workers of it are no ranks."""
        modules = ("sd_perf", "sd_perf.cluster.bound")
        runs = self.words[1:2] == ("-m",) and self.words[2:3] and self.words[2] in modules
        return bool(runs) and (
            (self.words[3:4] == ("train",) and bool({"RANK", "SLURM_PROCID"} & self.variables))
            or self.words[3:4] == ("evaluate",)
            or self.words[3:5] == ("cluster", "conclude")
        )


def processes(mark: Path) -> list[Process]:
    """The living processes that began with this mark in their environment."""
    found, needle = [], f"{MARK}={mark}"
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            values = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            if needle in values:
                words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
                names = frozenset(value.partition("=")[0] for value in values)
                found.append(Process(int(folder.name), tuple(words[:-1]), names))
    return found


def end_all(found: Iterable[Process]) -> None:
    """Kill processes by their numbers."""
    for process in found:
        with suppress(ProcessLookupError):
            os.kill(process.number, signal.SIGKILL)


def wait(condition: Callable[[], bool], seconds: float, poll: float = 0.05) -> bool:
    """Wait until a condition holds, but no longer than this; whether it does."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(poll)
    return True
