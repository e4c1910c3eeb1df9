"""Sinks get every line, score and picture of the folder once, also where the run was cut short."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from sd_perf.errors import ConfigError, UserError
from sd_perf.runs.folder import open_run
from sd_perf.sinks import feed as feed_module
from sd_perf.sinks.feed import Feed, send_evaluation
from sd_perf.training.callbacks.base import Callback
from sd_perf.training.callbacks.checkpointer import Checkpointer
from sd_perf.training.callbacks.metrics import MetricsFile
from sd_perf.training.callbacks.sinks import SendToSinks


class FakeSink:
    """Notes what it is given; fails at a position, where it is told to."""

    keeps_values = True

    def __init__(self) -> None:
        self.got: list[tuple] = []
        self.fails_at: int | None = None

    def values(self, group: str, samples: int, values: dict[str, float]) -> None:
        if samples == self.fails_at:
            raise RuntimeError("no route to host")
        self.got.append((group, samples))

    def picture(self, samples: int, path: Path) -> None:
        self.got.append(("picture", samples))

    def close(self) -> None:
        self.got.append(("closed",))


@pytest.fixture
def sink(monkeypatch: pytest.MonkeyPatch) -> FakeSink:
    """What any name in logging.sinks opens."""
    made = FakeSink()
    monkeypatch.setattr(feed_module, "_opened", lambda name, run, config: made)
    return made


@pytest.fixture
def sinks_run(make_config: Callable) -> Callable:
    """sinks_run(): config and folder of a run of one sink, with three lines of metrics."""

    def make(*names: str):
        config = make_config(logging={"sinks": list(names or ("tensorboard",))})
        open_run(config, resume=False)
        folder = Path(config.run.dir)
        write_lines(folder / "metrics.jsonl", [{"samples": n, "loss": 1.0} for n in (20, 40, 60)])
        return config, folder

    return make


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def evaluated(folder: Path, *positions: int) -> None:
    """Scores and a grid at each position."""
    write_lines(folder / "scores.jsonl", [{"samples": n, "n": 8, "fid": 3.0} for n in positions])
    (folder / "samples").mkdir(exist_ok=True)
    for samples in positions:
        Image.new("RGB", (6, 4)).save(folder / "samples" / f"samples_{samples:010d}.png")


def all_of(*positions: int) -> list[tuple]:
    return [("train", samples) for samples in positions]


def test_a_sink_gets_what_the_folder_has_once(sinks_run, sink: FakeSink) -> None:
    config, folder = sinks_run()
    evaluated(folder, 40)
    send_evaluation(folder, config, pytest.fail)
    assert sink.got == [*all_of(20, 40, 60), ("scores", 40), ("picture", 40), ("closed",)]
    sink.got.clear()
    evaluated(folder, 40, 60)
    send_evaluation(folder, config, pytest.fail)
    assert sink.got == [("scores", 60), ("picture", 60), ("closed",)]


def test_scores_of_the_average_are_a_group_of_their_own(sinks_run, sink: FakeSink) -> None:
    config, folder = sinks_run()
    evaluated(folder, 40)
    send_evaluation(folder, config, pytest.fail)
    sink.got.clear()
    record = json.loads((folder / "sinks.json").read_text())
    del record["tensorboard"]["scores_ema"]  # as earlier versions wrote it
    (folder / "sinks.json").write_text(json.dumps(record))
    write_lines(folder / "scores_ema.jsonl", [{"samples": 40, "n": 8, "fid": 2.0}])
    for expected in ([("scores_ema", 40), ("closed",)], [("closed",)]):
        send_evaluation(folder, config, pytest.fail)
        assert sink.got == expected
        sink.got.clear()
    resumed = Feed(folder, config, pytest.fail, position=20)
    resumed.take_scores_and_pictures()
    assert ("scores_ema", 40) in sink.got  # it may be another average now


def test_what_a_resumed_run_computes_again_is_sent_again(sinks_run, sink: FakeSink) -> None:
    config, folder = sinks_run()
    evaluated(folder, 40, 60)
    send_evaluation(folder, config, pytest.fail)
    sink.got.clear()
    write_lines(folder / "metrics.jsonl", [{"samples": n} for n in (20, 40)])
    resumed = Feed(folder, config, pytest.fail, position=40)
    resumed.step({"samples": 60, "loss": 2.0})
    assert sink.got == all_of(60)
    resumed.take_scores_and_pictures()
    assert sink.got == [*all_of(60), ("scores", 60), ("picture", 60)]


def test_a_sink_that_fails_is_told_of_once_and_gets_the_rest_later(sinks_run, sink) -> None:
    config, folder = sinks_run()
    told: list[str] = []
    sink.fails_at = 40
    failing = Feed(folder, config, told.append)
    failing.catch_up()
    failing.step({"samples": 80})
    failing.close()
    assert sink.got == all_of(20)
    assert len(told) == 1 and "tensorboard failed (no route to host)" in told[0]
    sink.fails_at, sink.got = None, []
    send_evaluation(folder, config, pytest.fail)
    assert sink.got == [*all_of(20, 40, 60), ("closed",)]


def test_files_that_are_no_pictures_are_passed_over(sinks_run, sink: FakeSink) -> None:
    config, folder = sinks_run()
    evaluated(folder, 40)
    (folder / "samples" / "samples_0000000060.png").write_text("no picture")
    (folder / "samples" / "samples_60.png").write_bytes(b"")
    send_evaluation(folder, config, pytest.fail)
    assert [got for got in sink.got if got[0] == "picture"] == [("picture", 40)]


@pytest.mark.parametrize("record", ["{", "[]", '{"csv": {"train": 0}}', '{"csv": 3}'])
def test_a_damaged_record_is_one_sentence(record: str, sinks_run) -> None:
    config, folder = sinks_run("csv")
    (folder / "sinks.json").write_text(record)
    with pytest.raises(UserError, match=r"sinks\.json: (is no record of sinks|cannot be read)"):
        Feed(folder, config, pytest.fail)


def test_a_missing_package_is_told_before_training(sinks_run, monkeypatch) -> None:
    config, folder = sinks_run("wandb")
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install 'sd-perf\[wandb\]'"):
        Feed(folder, config, pytest.fail)


class StopAt(Callback):
    """As kill -9 does: no hook is called afterwards."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def on_step(self, trainer) -> None:
        if trainer.samples == self.samples:
            raise KeyboardInterrupt


def callbacks() -> list[Callback]:
    return [MetricsFile(), SendToSinks(pytest.fail), Checkpointer()]


@pytest.mark.slow
def test_a_run_that_was_cut_short_has_the_curves_of_one_that_was_not(
    make_config, make_trainer
) -> None:
    changes = {"logging": {"sinks": ["csv"], "every_steps": 2}, "training": {"max_samples": 80}}
    cut, whole = (make_config(name, **changes) for name in ("cut", "whole"))
    make_trainer(whole, callbacks()).fit()
    with pytest.raises(KeyboardInterrupt):
        make_trainer(cut, [*callbacks(), StopAt(60)]).fit()
    assert len(rows(cut)) == 7
    make_trainer(cut, callbacks(), resume=True).fit()
    assert [(row["samples"], row["loss"]) for row in rows(cut)] == [
        (row["samples"], row["loss"]) for row in rows(whole)
    ]
    assert [int(row["samples"]) for row in rows(cut)] == list(range(8, 81, 8))
    record = json.loads((Path(cut.run.dir) / "sinks.json").read_text())
    nothing = {"scores": [], "scores_ema": [], "pictures": []}
    assert record == {"csv": {"train": 80, **nothing}}


def rows(config) -> list[dict[str, str]]:
    with (Path(config.run.dir) / "train.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_csv_files_of_scores_and_pictures(sinks_run) -> None:
    config, folder = sinks_run("csv")
    write_lines(folder / "scores.jsonl", [{"samples": 40, "n": 8, "fid": 3.5}])
    send_evaluation(folder, config, pytest.fail)
    evaluated(folder, 40, 60)
    extra = {"samples": 60, "n": 8, "clip": 0.25, "words": "left out", "passed": True}
    write_lines(folder / "scores.jsonl", [{"samples": 40, "n": 8, "fid": 3.5}, extra])
    send_evaluation(folder, config, pytest.fail)
    assert (folder / "scores.csv").read_text().split() == [
        "samples,n,fid,clip",
        "40,8,3.5,",
        "60,8,,0.25",
    ]
    assert "60,samples/samples_0000000060.png" in (folder / "pictures.csv").read_text()
