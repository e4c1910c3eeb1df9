"""A run whose numbers are no longer finite stops, and does not save them."""

from __future__ import annotations

import pytest

from sd_perf.runs.checkpoints import load_component
from tests.cli.bad_input import (
    matches,
    newest,
)


@pytest.mark.parametrize("every_samples", [4, 1000])
def test_loss_not_finite(every_samples, preset, run, refused):
    """The first step has rate 0; the second throws the weights away while its own loss is still
    finite."""
    options = [
        "--optimizer.base-learning-rate",
        1e30,
        "--optimizer.warmup-steps",
        1,
        "--optimizer.warmup-start",
        0,
    ]
    command = [
        "train",
        "--config",
        preset,
        "--run.dir",
        run,
        *options,
        "--training.max-samples",
        40,
    ]
    sentence = refused(
        *command, "--checkpoint.every-samples", every_samples, "--logging.every-steps", 1
    )
    matches(
        sentence,
        "not finite after",
        "this state was not saved",
        "lower optimizer.base_learning_rate",
    )
    if every_samples == 4:
        matches(
            sentence, "weights or optimizer moments are not finite after 8 samples", newest(run)
        )
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["samples_0000000004"]
        assert all(
            tensor.isfinite().all() for tensor in load_component(newest(run), "model").values()
        )
    else:
        matches(sentence, "loss is not finite", "there is no complete checkpoint yet")
        assert not (run / "checkpoints").exists()
