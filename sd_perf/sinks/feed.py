"""Brings the sinks of a run up to date with its folder, which has every value and picture.

`RUN/sinks.json` says what each sink has. So a sink that is asked for later, or that was out of
reach, gets what it lacks at the next start, and nothing is given twice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sd_perf.config import Config
from sd_perf.errors import UserError
from sd_perf.files import (
    disk_errors,
    one_line,
    opened_untrusted,
    read_json,
    require_shape,
    write_json,
)
from sd_perf.runs.folder import read_run_id
from sd_perf.runs.scores import by_position, is_number, scores_path, sort_out_lines
from sd_perf.sinks.csv_files import CsvSink
from sd_perf.sinks.sink import Sink, SinkRun
from sd_perf.sinks.tensorboard import TensorBoardSink
from sd_perf.sinks.wandb import WandbSink

RECORD_NAME = "sinks.json"
_RECORD = {"train": int, "scores": [int], "scores_ema?": [int], "pictures": [int]}


@dataclasses.dataclass
class _Sent:
    """Positions, in samples, of what a sink has."""

    train: int = 0
    """of the newest logged step"""
    scores: list[int] = dataclasses.field(default_factory=list)
    scores_ema: list[int] = dataclasses.field(default_factory=list)
    """of the average of the weights"""
    pictures: list[int] = dataclasses.field(default_factory=list)

    def up_to(self, position: int) -> _Sent:
        """What is left where training goes on from an earlier position."""
        scores, scores_ema, pictures = (
            [samples for samples in of if samples <= position]
            for of in (self.scores, self.scores_ema, self.pictures)
        )
        return _Sent(min(self.train, position), scores, scores_ema, pictures)


class Feed:
    """The open sinks of `logging.sinks`.

    A sink that fails is told of and left out from then on: the run does not depend on it, and the
    folder has what it misses.
    """

    def __init__(
        self, folder: Path, config: Config, tell: Callable[[str], None], position: int | None = None
    ) -> None:
        """Opens the sinks; UserError where one cannot begin.

        `position` is that of the training that goes on, where this is for training.
        """
        self._folder, self._tell = folder, tell
        self._record = _read_record(folder)
        self._sinks: dict[str, Sink] = {}
        self._sent: dict[str, _Sent] = {}
        run = SinkRun(folder, read_run_id(folder), dataclasses.asdict(config), position)
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            for name in config.logging.sinks:
                self._sinks[name] = sink = _opened(name, run, config)
                sent = self._record.get(name, _Sent()) if sink.keeps_values else _Sent()
                self._sent[name] = sent if position is None else sent.up_to(position)
            stack.pop_all()

    def catch_up(self) -> None:
        """Give every sink what the run folder has and it has not."""
        metrics = sort_out_lines(self._folder / "metrics.jsonl", ("samples",)).objects
        for name, sink, sent in self._open():
            for line in metrics:
                if line["samples"] > sent.train:
                    self._give(name, sink.values, "train", line["samples"], _numbers(line))
                    sent.train = line["samples"]
        self.take_scores_and_pictures()

    def step(self, metrics: Mapping[str, float]) -> None:
        """Give every sink the metrics of a logged step."""
        samples = int(metrics["samples"])
        for name, sink, sent in self._open():
            self._give(name, sink.values, "train", samples, _numbers(metrics))
            sent.train = samples

    def take_scores_and_pictures(self) -> None:
        """Give every sink what an evaluation has added to the folder, and note what each has."""
        scores, scores_ema = (
            by_position(sort_out_lines(scores_path(self._folder, ema), ("samples",)).objects)
            for ema in (False, True)
        )
        pictures = list(_pictures(self._folder))
        for name, sink, sent in self._open():
            groups = {"scores": (scores, sent.scores), "scores_ema": (scores_ema, sent.scores_ema)}
            for group, (lines, given) in groups.items():
                for line in (line for line in lines if line["samples"] not in given):
                    self._give(name, sink.values, group, line["samples"], _numbers(line))
                    given.append(line["samples"])
            for samples, path in pictures:
                if samples not in sent.pictures:
                    self._give(name, sink.picture, samples, path)
                    sent.pictures.append(samples)
        self._write_record()

    def close(self) -> None:
        """Close every sink, and note what each has."""
        for name, sink, _ in self._open():
            self._give(name, sink.close)
        self._write_record()
        self._sinks = {}

    def _open(self) -> list[tuple[str, Sink, _Sent]]:
        return [(name, sink, self._sent[name]) for name, sink in self._sinks.items()]

    def _give(self, name: str, call: Callable[..., None], *values: Any) -> None:
        """Call a method of a sink that has not failed yet."""
        if name not in self._sinks:
            return
        try:
            call(*values)
        except Exception as error:  # of any library, and none may end a run
            del self._sinks[name]
            self._tell(
                f"logging.sinks: {name} failed ({one_line(error)}); the run goes on without it, "
                "and it gets what it lacks when the run is next resumed"
            )

    def _write_record(self) -> None:
        if not self._sinks:
            return
        self._record |= {name: dataclasses.replace(sent) for name, _, sent in self._open()}
        path = self._folder / RECORD_NAME
        with disk_errors(path, "make room there"):
            write_json(
                path, {name: dataclasses.asdict(sent) for name, sent in self._record.items()}
            )


def send_evaluation(folder: Path, config: Config, tell: Callable[[str], None]) -> None:
    """Give the sinks of a run that is not training what an evaluation has added to its folder."""
    try:
        with contextlib.closing(Feed(folder, config, tell)) as feed:
            feed.catch_up()
    except UserError as error:  # the scores are kept, wherever else they cannot be shown
        tell(f"{error}; the sinks get these scores when the run is next evaluated or resumed")


def _opened(name: str, run: SinkRun, config: Config) -> Sink:
    if name == "wandb":
        return WandbSink(run, config.logging)
    place = run.folder / name
    with disk_errors(place, "make room there, or take it out of logging.sinks"):
        return TensorBoardSink(run) if name == "tensorboard" else CsvSink(run)


def _read_record(folder: Path) -> dict[str, _Sent]:
    path = folder / RECORD_NAME
    record = read_json(path)
    if record is None:
        return {}
    require_shape(record, {}, f"{path}: is no record of sinks")
    for name, sent in record.items():
        require_shape(sent, _RECORD, f"{path}: is no record of sinks: {name[:40]}")
    known = [field.name for field in dataclasses.fields(_Sent)]
    return {
        name: _Sent(**{key: sent[key] for key in known if key in sent})
        for name, sent in record.items()
    }


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line of metrics or scores, without its position."""
    return {key: line[key] for key in line if key != "samples" and is_number(key, line[key])}


def _pictures(folder: Path) -> Iterator[tuple[int, Path]]:
    """Position and path of each grid of pictures, oldest first; what is no PNG is passed over."""
    for path in sorted(folder.glob("samples/samples_*.png")):
        if name := re.fullmatch(r"samples_(\d{10})", path.stem):
            with opened_untrusted(path) as file:
                is_png = file.read(24).startswith(b"\x89PNG\r\n\x1a\n")
            if is_png:
                yield int(name[1]), path
