"""The file for Prometheus, read with its own parser."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from sd_perf.errors import UserError
from sd_perf.training.callbacks.base import Callback
from sd_perf.training.callbacks.checkpointer import Checkpointer
from sd_perf.training.callbacks.prometheus import PrometheusFile

pytest.importorskip("prometheus_client", reason="needs pip install 'sd-perf[prometheus]'")


def values(path: Path) -> dict[str, float]:
    from prometheus_client.parser import text_string_to_metric_families

    families = text_string_to_metric_families(path.read_text())
    return {sample.name: sample.value for family in families for sample in family.samples}


class Reader(Callback):
    """Reads the file at each logged step, as the exporter would."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seen: list[dict[str, float]] = []

    def on_log(self, trainer, metrics) -> None:
        self.seen.append(values(self.path))


def test_the_state_of_a_run(make_config, make_trainer, tmp_path: Path) -> None:
    path, begun = tmp_path / "sd_perf.prom", time.time()
    reader = Reader(path)
    config = make_config(training={"max_samples": 60}, checkpoint={"every_samples": 20})
    make_trainer(config, [PrometheusFile(path), Checkpointer(), reader]).fit()
    assert [seen["sd_perf_samples"] for seen in reader.seen] == [20, 40, 60]
    assert all(seen["sd_perf_training"] == 1 for seen in reader.seen)
    last = values(path)
    assert last["sd_perf_training"] == 0 and last["sd_perf_total_samples"] == 60
    assert last["sd_perf_loss"] > 0 and last["sd_perf_samples_per_second"] > 0
    assert begun <= last["sd_perf_checkpoint_timestamp_seconds"] <= time.time()
    assert 0 <= last["sd_perf_checkpoint_age_seconds"] < 100
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run", "sd_perf.prom"]


def test_a_folder_that_is_not_there(make_config, make_trainer, tmp_path: Path) -> None:
    trainer = make_trainer(make_config(), [PrometheusFile(tmp_path / "no" / "x.prom")])
    with pytest.raises(UserError, match=r"x\.prom cannot be written .* make its folder"):
        trainer.fit()
