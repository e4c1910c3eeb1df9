"""What TensorBoard itself reads from the event files of a run that was resumed."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from sd_perf.sinks.sink import SinkRun
from sd_perf.sinks.tensorboard import TensorBoardSink

pytestmark = pytest.mark.slow
pytest.importorskip("tensorboard", reason="needs pip install 'sd-perf[tensorboard]'")


def sink(folder: Path, position: int | None) -> TensorBoardSink:
    return TensorBoardSink(SinkRun(folder, "0" * 32, {}, position))


def test_a_resumed_run_continues_its_curves(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    picture = tmp_path / "samples_0000000040.png"
    Image.new("RGB", (6, 4)).save(picture)
    first = sink(tmp_path, 0)
    for samples in (20, 40, 60, 80):
        first.values("train", samples, {"loss": 1.0, "lr": 0.5})
    first.values("scores", 40, {"fid": 3.0})
    first.picture(40, picture)
    first.close()
    second = sink(tmp_path, 40)
    second.values("train", 60, {"loss": 2.0, "lr": 0.5})
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert losses == [(20, 1.0), (40, 1.0), (60, 2.0)]
    assert [event.step for event in events.Scalars("scores/fid")] == [40]
    image = events.Images("pictures")[0]
    assert (image.step, image.width, image.height) == (40, 6, 4)
    assert image.encoded_image_string == picture.read_bytes()
