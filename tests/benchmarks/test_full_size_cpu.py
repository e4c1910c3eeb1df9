"""The full-size CPU run, at a small size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import full_size_cpu
from sd_perf.config import UNetConfig
from sd_perf.models.vae import AutoencoderConfig

PIL_Image = pytest.importorskip("PIL.Image")

SMALL = full_size_cpu.Sizes(
    unet=UNetConfig(
        model_channels=32,
        channel_mult=(1, 2),
        attention_resolutions=(1, 2),
        num_head_channels=32,
        context_dim=32,
        transformer_groups=8,
    ),
    autoencoder=AutoencoderConfig(
        channels=8, channel_mult=(1, 1, 2, 2), num_res_blocks=1, groups=4
    ),
    image=64,
    context_tokens=5,
)


def write_photographs(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    lines = []
    for number in range(count):
        pixels = rng.integers(0, 256, (80, 100, 3), dtype=np.uint8)
        PIL_Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append(json.dumps({"file": f"{number}.png", "captions": [f"picture {number}"]}))
    (folder / "captions.jsonl").write_text("\n".join(lines))


def test_every_stage_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_photographs(tmp_path, count=3)
    output = tmp_path / "out"
    output.mkdir()
    report = full_size_cpu.environment() | full_size_cpu.measure(tmp_path, output, SMALL)
    json.dumps(report, allow_nan=False)
    names = [row["stage"] for row in report["stages"]]
    for part in (
        "encode",
        "shard: write",
        "shard: index and load",
        "forward",
        "backward",
        "AdamW",
        "DDIM",
        "decode",
    ):
        assert any(part in name for name in names), part
    assert all(row["seconds"] > 0 and row["peak_memory_bytes"] > 2**20 for row in report["stages"])
    assert all(0 < loss < 100 for loss in report["losses"].values())
    for name in report["pictures"]:
        assert PIL_Image.open(output / name).size == (64, 64)
    assert "random, seeded" in full_size_cpu.table(report)
    capsys.readouterr()


def test_too_few_photographs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_photographs(tmp_path, count=1)
    assert full_size_cpu.main(["--images", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "2 are needed" in capsys.readouterr().err
