"""Score and place of a log."""

from __future__ import annotations

import pytest

from sd_perf.cluster.conclude import copy_log, score
from sd_perf.errors import UserError
from sd_perf.mlperf.log import MLPerfLog


@pytest.fixture
def log(make_config, tmp_path):
    path = tmp_path / "result_0.txt"
    writer = MLPerfLog(path, make_config(mlperf={"division": "open"}))
    writer.start_init()
    writer.start_run()
    assert score(path) == "score: none, the log has no run_stop"
    writer.start_block(0)
    writer.stop_block(512)
    return path, writer


def test_a_run_that_converged(log):
    path, writer = log
    writer.add_evaluation(512, 80.0, 0.2, 0, 1)
    assert writer.conclude() == "success"
    assert score(path).endswith("minutes to the targets (512 samples)")


def test_a_run_that_did_not(log):
    path, writer = log
    assert writer.conclude() == "aborted"
    assert score(path).startswith("score: none, not converged after")


def test_a_log_takes_no_other_ones_place(log, tmp_path):
    path, _ = log
    place = tmp_path / "results/system/stable_diffusion/result_3.txt"
    copy_log(path, place)
    copy_log(path, place)
    assert place.read_bytes() == path.read_bytes()
    place.write_text("another")
    with pytest.raises(UserError, match="is the log of another run"):
        copy_log(path, place)
