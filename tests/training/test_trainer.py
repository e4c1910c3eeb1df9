"""What a trainer refuses to continue from: checkpoints of another run, config, seed or data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sd_perf.errors import CheckpointError
from sd_perf.runs.folder import read_run_id
from sd_perf.training.callbacks.checkpointer import Checkpointer
from tests.runs.test_checkpoints import reseal
from tests.small_run import small_config, small_trainer


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    config = small_config(tmp_path_factory.mktemp("trained") / "run", training={"max_samples": 40})
    trainer = small_trainer(config, [Checkpointer()])
    trainer.fit()
    return trainer


@pytest.fixture
def trained(trained_once, tmp_path):
    """A trainer at its end, sample 40, and a copy of its only checkpoint to spoil."""
    newest = trained_once.store.newest()
    return trained_once, Path(shutil.copytree(newest, tmp_path / newest.name))


def test_state_names_run_and_config(trained):
    trainer, path = trained
    manifest = json.loads((trainer.folder / "run_manifest.json").read_text())
    state = json.loads((path / "state.json").read_text())
    assert state["run_id"] == manifest["run_id"] and len(state["run_id"]) == 32
    assert len(state["config_digest"]) == 64
    trainer.load(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run_id": "0" * 32}, "is of another run (" + "0" * 32),
        ({"config_digest": "0" * 64}, "was trained with another config ('0000"),
        ({"seed": 1}, "was trained with another seed (1, here 0)"),
        ({"dataset": {"samples": "x" * 10_000}}, "was trained on other data ({'samples': 'xxx"),
        ({"dataset": {"samples": 1}}, "was trained on other data ({'samples': 1}, here"),
        ({"steps": 11}, "state.json: 40 samples are not 11 steps of 4"),
        ({"steps": 0}, "state.json: 40 samples are not 0 steps of 4"),
    ],
)
def test_a_state_that_is_not_this_runs(changes, words, trained):
    trainer, path = trained
    reseal(path, lambda state: state.update(changes))
    with pytest.raises(CheckpointError) as told:
        trainer.load(path)
    assert words in str(told.value) and str(path) in str(told.value)
    assert len(str(told.value)) < 900


def test_a_position_between_two_steps(trained):
    trainer, path = trained
    reseal(path, lambda state: state.update(samples=41))
    odd = path.rename(path.with_name("samples_0000000041"))
    with pytest.raises(CheckpointError, match="41 samples are not 10 steps of 4"):
        trainer.load(odd)


def test_a_checkpoint_of_another_run(trained, make_config, make_trainer):
    """Of the same config and data: only the id tells them apart."""
    _, path = trained
    other = make_trainer(make_config("other", training={"max_samples": 40}))
    with pytest.raises(CheckpointError, match="is of another run"):
        other.load(path)


def test_the_id_stays_when_a_run_is_resumed(trained, make_config, make_trainer, tmp_path):
    trainer, _ = trained
    shutil.copytree(trainer.folder, tmp_path / "run")
    longer = make_config(training={"max_samples": 80})
    resumed = make_trainer(longer, [Checkpointer()], resume=True)
    resumed.fit()
    states = [json.loads((p / "state.json").read_text()) for p in resumed.store.complete()]
    assert len({(state["run_id"], state["config_digest"]) for state in states}) == 1
    assert states[0]["run_id"] == read_run_id(trainer.folder) and len(states) == 2
