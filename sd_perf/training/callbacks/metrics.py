"""metrics.jsonl: one JSON object per logged step; bad_samples.jsonl: one per replaced sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from sd_perf.distributed.checkpoints import MAKE_ROOM
from sd_perf.files import disk_errors, write_text
from sd_perf.training.callbacks.base import Callback

if TYPE_CHECKING:
    from sd_perf.training.trainer import Trainer


class MetricsFile(Callback):
    """Written by the main rank. A resumed run continues the file at its position."""

    def __init__(self) -> None:
        self._file: TextIO | None = None

    def on_start(self, trainer: Trainer) -> None:
        if trainer.world.is_main:
            path = trainer.folder / "metrics.jsonl"
            with disk_errors(path, MAKE_ROOM):
                _set_aside_lines_after(path, trainer.samples)
                self._file = path.open("a", encoding="utf-8", buffering=1)

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if self._file:
            with disk_errors(Path(self._file.name), MAKE_ROOM):
                self._file.write(json.dumps(metrics) + "\n")

    def close(self, trainer: Trainer) -> None:
        if self._file:
            with disk_errors(Path(self._file.name), MAKE_ROOM):  # it tries again what could not be written
                self._file.close()


def _set_aside_lines_after(path: Path, samples: int) -> None:
    """Move lines of steps that a killed run took after its last checkpoint to metrics.superseded.jsonl."""
    if not path.is_file():
        return
    whole = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
    later = [line for line in whole if json.loads(line)["samples"] > samples]
    if later:
        with path.with_name("metrics.superseded.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in later)
    write_text(path, "".join(line + "\n" for line in whole if line not in later))
