"""Bad input in processes of their own, one or two under a launcher: one of them says it, once."""

from __future__ import annotations

import pytest

from sd_perf.data.order import SampleOrder
from tests.cli.bad_input import (
    data_options,
    fail,
    matches,
    newest,
    write_shards,
)
from tests.conftest import only_sentence


def test_process(preset, run, tmp_path):
    matches(
        fail(preset, run, *data_options(tmp_path / "absent")),
        "absent is not a folder; data.path must name",
    )
    matches(fail(tmp_path / "no.yaml", run), "no.yaml: no such config file")
    assert not run.exists()


@pytest.mark.slow
def test_two_processes_and_a_batch_that_does_not_divide(preset, run):
    sentence = fail(preset, run, "--training.global-batch-size", 5, processes=2)
    matches(
        sentence, "training.global_batch_size: 5", "a multiple of ranks x accumulate_steps = 2 x 1"
    )
    assert not run.exists()


@pytest.mark.slow
def test_two_processes_and_a_bad_sample_on_the_second(preset, run, shards):
    """Position 5 is of the second step and the second rank; the first rank must not wait for it."""
    write_shards(shards, {SampleOrder(seed=0, num_samples=16).sample(5)})
    sentence = fail(preset, run, *data_options(shards), processes=2)
    matches(
        sentence,
        f"sd-perf: rank 1: {shards}: sample 0000000",
        "NaN or infinite",
        "data.max_bad_samples",
    )
    assert newest(run).name == "samples_0000000004"


def test_two_processes_and_no_config(run, tmp_path):
    matches(fail(tmp_path / "no.yaml", run, processes=2), "no.yaml: no such config file")


def test_debug_adds_the_traceback(tmp_path, sd_perf):
    code, _, errors = sd_perf("train", "--config", tmp_path / "no.yaml", "--debug")
    assert code == 2 and "Traceback (most recent call last)" in errors and "presets.py" in errors
    only_sentence(errors.splitlines()[-1])
