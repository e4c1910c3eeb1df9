"""TensorBoard event files in RUN/tensorboard. `tensorboard --logdir runs` shows every run."""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sd_perf.files import read_untrusted
from sd_perf.optional import optional
from sd_perf.sinks.sink import SinkRun

_MAX_PICTURE_BYTES = 64 * 2**20
_FLUSH_SECONDS = 10


class TensorBoardSink:
    """Uses the writer of event files alone, which needs neither TensorFlow nor torch."""

    keeps_values = True

    def __init__(self, run: SinkRun) -> None:
        library = "tensorboard.summary.writer.event_file_writer"
        need = "logging.sinks: tensorboard needs TensorBoard"
        writer = optional(library, need, "tensorboard")
        self._event = optional("tensorboard.compat.proto.event_pb2", need, "tensorboard")
        self._summary = optional("tensorboard.compat.proto.summary_pb2", need, "tensorboard")
        self._writer = writer.EventFileWriter(
            str(run.folder / "tensorboard"), flush_secs=_FLUSH_SECONDS
        )
        if run.position is not None:
            # TensorBoard drops what earlier files have of this step and later ones.
            started = self._event.SessionLog(status=self._event.SessionLog.START)
            self._add(run.position + 1, session_log=started)

    def values(self, group: str, samples: int, values: Mapping[str, float]) -> None:
        numbers = [
            self._summary.Summary.Value(tag=f"{group}/{name}", simple_value=value)
            for name, value in values.items()
        ]
        self._add(samples, summary=self._summary.Summary(value=numbers))

    def picture(self, samples: int, path: Path) -> None:
        png = read_untrusted(path, _MAX_PICTURE_BYTES)
        width, height = struct.unpack(">II", png[16:24])  # where PNG has them
        image = self._summary.Summary.Image(
            encoded_image_string=png, width=width, height=height, colorspace=3
        )
        value = self._summary.Summary.Value(tag="pictures", image=image)
        self._add(samples, summary=self._summary.Summary(value=[value]))

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, **content))
