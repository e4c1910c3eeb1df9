"""Hooks are called where the docstrings say, and a callback's state passes through a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sd_perf.data.shard_writer import ShardWriter
from sd_perf.errors import DataError
from sd_perf.training.callbacks.base import Callback, TrainerView
from sd_perf.training.callbacks.checkpointer import Checkpointer


class Recorder(Callback):
    """Notes every hook with the position; its state is the number of steps it has seen."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []
        self.steps = 0

    def on_start(self, trainer: TrainerView) -> None:
        self.seen.append(("start", trainer.samples))

    def before_step(self, trainer: TrainerView) -> None:
        self.seen.append(("before", trainer.samples))

    def on_step(self, trainer: TrainerView) -> None:
        self.seen.append(("step", trainer.samples))
        self.steps += 1

    def checkpoint_saved(self, trainer: TrainerView, path: Path) -> None:
        assert json.loads((path / "state.json").read_text())["samples"] <= trainer.samples
        self.seen.append(("saved", int(path.name.removeprefix("samples_"))))

    def on_end(self, trainer: TrainerView) -> None:
        self.seen.append(("end", trainer.samples))

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps} if self.steps else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def test_each_step_is_told_before_and_after(make_config, make_trainer) -> None:
    recorder = Recorder()
    make_trainer(make_config(training={"max_samples": 8}), [recorder]).fit()
    steps = [("before", 0), ("step", 4), ("before", 4), ("step", 8)]
    assert recorder.seen == [("start", 0), *steps, ("end", 8)]


def test_what_is_done_once_is_done_before_the_start(make_config, make_trainer, monkeypatch) -> None:
    """An MLPerf run starts its clock with `on_start`: compilation and tuning come before it."""
    recorder = Recorder()
    trainer = make_trainer(make_config(training={"max_samples": 4}), [recorder])
    monkeypatch.setattr(trainer.step, "prepare", lambda: recorder.seen.append(("prepared", 0)))
    trainer.fit()
    assert recorder.seen[:2] == [("prepared", 0), ("start", 0)]


def test_every_checkpoint_is_told_once_and_complete(make_config, make_trainer) -> None:
    recorder = Recorder()
    config = make_config(training={"max_samples": 100}, checkpoint={"every_samples": 40})
    make_trainer(config, [Checkpointer(), recorder]).fit()
    assert [place for hook, place in recorder.seen if hook == "saved"] == [40, 80, 100]
    assert recorder.seen[-1] == ("saved", 100)  # the last is complete after on_end has waited


def test_state_is_kept_in_checkpoints(make_config, make_trainer) -> None:
    first = make_config(training={"max_samples": 40})
    make_trainer(first, [Recorder(), Checkpointer()]).fit()
    resumed = Recorder()
    make_trainer(make_config(training={"max_samples": 80}), [resumed], resume=True)
    assert resumed.steps == 10


def test_a_checkpoint_without_the_state_leaves_it_as_it_is(make_config, make_trainer) -> None:
    make_trainer(make_config(training={"max_samples": 40}), [Checkpointer()]).fit()
    resumed = Recorder()
    make_trainer(make_config(training={"max_samples": 80}), [resumed], resume=True)
    assert resumed.steps == 0


class WriteToShardAt(Callback):
    def __init__(self, shard: Path, samples: int) -> None:
        self.shard, self.samples = shard, samples

    def on_step(self, trainer: TrainerView) -> None:
        if trainer.samples == self.samples:
            with self.shard.open("r+b") as stream:
                stream.write(stream.read(1))


def test_no_checkpoint_of_shards_that_were_written_to(make_config, make_trainer, tmp_path) -> None:
    with ShardWriter(tmp_path / "shards") as writer:
        for number in range(8):
            states = np.zeros((3, 16), np.float16)
            writer.write(np.zeros((8, 8, 8)), f"caption {number}", {}, states)
    data = {"format": "moments", "path": str(tmp_path / "shards"), "context": "precomputed"}
    trainer = make_trainer(
        make_config(data=data),
        [WriteToShardAt(tmp_path / "shards" / "00000.tar", 60), Checkpointer()],
    )
    with pytest.raises(DataError, match=r"00000\.tar was written to while it was read"):
        trainer.fit()
    assert [path.name for path in trainer.store.complete()] == ["samples_0000000040"]
