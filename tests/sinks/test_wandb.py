"""Weights & Biases, offline: the file that `wandb sync` would send."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from sd_perf.config import LoggingConfig
from sd_perf.errors import UserError
from sd_perf.sinks.sink import SinkRun
from sd_perf.sinks.wandb import WandbSink

pytestmark = pytest.mark.slow
wandb = pytest.importorskip("wandb", reason="needs pip install 'sd-perf[wandb]'")


def run_of(folder: Path) -> SinkRun:
    return SinkRun(folder, "0123456789abcdef" * 2, {"training": {"seed": 7}}, None)


def test_offline(tmp_path: Path) -> None:
    picture = tmp_path / "samples_0000000040.png"
    Image.new("RGB", (6, 4)).save(picture)
    sink = WandbSink(run_of(tmp_path), LoggingConfig(wandb_mode="offline"))
    sink.values("train", 40, {"loss": 1.5})
    sink.picture(40, picture)
    sink.close()
    (kept,) = tmp_path.glob("wandb/offline-run-*/run-0123456789abcdef0123456789abcdef.wandb")
    for word in (b"train/loss", b"samples", b"pictures", tmp_path.name.encode()):
        assert word in kept.read_bytes()
    assert list(kept.parent.glob("files/media/images/*.png"))


def test_without_a_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init(**options: object) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(UserError, match=r"No API key.*wandb login.*--logging.wandb-mode offline"):
        WandbSink(run_of(tmp_path), LoggingConfig())
