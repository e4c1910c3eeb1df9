"""kill -9 at random moments: the newest checkpoint always loads, and the run it continues is the
run never killed."""

from __future__ import annotations

import collections
import random
import time
from pathlib import Path

import pytest

from sd_perf.runs.checkpoints import CheckpointStore, read_state
from sd_perf.training.callbacks.checkpointer import Checkpointer
from tests.small_run import start_train, train
from tests.training.test_resume import assert_bit_identical, final_tensors, logged_steps
from tests.waiting import wait_for

KILLS, IN_A_WRITE = 20, 5
AIMS = ("any moment", "a write", "training")
OPTIONS = (
    *("--model.implementation", "fast"),
    *("--checkpoint.every-samples", "20", "--logging.every-steps", "1"),
)


def being_written(run: Path) -> bool:
    return any((run / "checkpoints").glob(".writing_*"))


def kill_once(preset: Path, run: Path, rng: random.Random, aim: str) -> str:
    """Continue the run, kill it, and name the phase the kill hit, read off what it left behind."""
    process = start_train(preset, run, "--resume", "--training.max-samples", "1000000", *OPTIONS)
    steps_before = logged_steps(run)
    if aim == "any moment":
        time.sleep(rng.uniform(0.5, 8))
    else:
        wait_for(lambda: logged_steps(run) > steps_before)
        time.sleep(rng.uniform(0, 2))
    if aim == "a write":
        wait_for(lambda: being_written(run), poll=0.001)
        time.sleep(rng.choice((0, rng.uniform(0, 0.15))))
    process.kill()
    process.communicate()
    if logged_steps(run) <= steps_before:
        return "start-up"
    return "checkpoint write" if being_written(run) else "training step"


@pytest.mark.slow
def test_kill_nine(preset, tmp_path, make_config, make_trainer):
    run, rng, phases, position = tmp_path / "run", random.Random(0), collections.Counter[str](), 0
    while sum(phases.values()) < KILLS or phases["checkpoint write"] < IN_A_WRITE:
        assert sum(phases.values()) < 3 * KILLS, f"too few kills hit a checkpoint write: {phases}"
        phase = kill_once(preset, run, rng, AIMS[sum(phases.values()) % len(AIMS)])
        phases[phase] += 1
        newest = CheckpointStore(run / "checkpoints").newest()
        print(
            f"kill {sum(phases.values())}: in {phase}; newest checkpoint {newest and newest.name}"
        )
        if newest:
            final_tensors(run)  # every tensor loads
            assert read_state(newest)["samples"] >= position
            position = read_state(newest)["samples"]
    print(dict(phases))

    end = str(position + 40)
    train(preset, run, "--resume", "--training.max-samples", end, *OPTIONS)
    fast, length = {"implementation": "fast"}, {"max_samples": int(end)}
    whole = make_trainer(make_config("whole", model=fast, training=length), [Checkpointer()])
    whole.fit()
    assert_bit_identical(final_tensors(run), final_tensors(whole.folder))
