"""metrics.jsonl: one JSON object per logged step."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from sd_perf.files import disk_errors, json_lines, write_text
from sd_perf.runs.checkpoints import MAKE_ROOM
from sd_perf.runs.scores import read_json_lines
from sd_perf.training.callbacks.base import Callback, TrainerView


class MetricsFile(Callback):
    """Written by the main rank. A resumed run continues the file at its position."""

    def __init__(self) -> None:
        self._file: TextIO | None = None

    def on_start(self, trainer: TrainerView) -> None:
        if trainer.world.is_main:
            path = trainer.folder / "metrics.jsonl"
            with disk_errors(path, MAKE_ROOM):
                _set_aside_lines_after(path, trainer.samples)
                self._file = path.open("a", encoding="utf-8", buffering=1)

    def on_log(self, trainer: TrainerView, metrics: dict[str, float]) -> None:
        if self._file:
            with disk_errors(Path(self._file.name), MAKE_ROOM):
                self._file.write(json_lines([metrics]))

    def close(self, trainer: TrainerView) -> None:
        if self._file:
            # Closing tries again to write what is still in the buffer.
            with disk_errors(Path(self._file.name), MAKE_ROOM):
                self._file.close()


def _set_aside_lines_after(path: Path, samples: int) -> None:
    """Move the lines after position `samples` to metrics.superseded.jsonl.

    They are of steps that a killed run took after its last checkpoint.
    """
    if not path.is_file():
        return
    lines, _ = read_json_lines(path, ("samples",))
    later = [line for line in lines if line["samples"] > samples]
    if later:
        with path.with_name("metrics.superseded.jsonl").open("a", encoding="utf-8") as file:
            file.write(json_lines(later))
    write_text(path, json_lines(line for line in lines if line["samples"] <= samples))
