"""The full-size CPU run, at a small size."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from benchmarks import full_size_cpu
from sd_perf.config import UNetConfig
from sd_perf.models.vae import AutoencoderConfig
from sd_perf.tools.doctor import RESULTS
from sd_perf.tools.results import read

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


@pytest.mark.slow
def test_every_stage_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_photographs(tmp_path, count=3)
    output = tmp_path / "out"
    output.mkdir()
    result = full_size_cpu.measure(tmp_path, output, SMALL)
    json.dumps(asdict(result), allow_nan=False)
    names = [row["stage"] for row in result.rows]
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
    assert all(row["seconds"] > 0 and row["peak_memory_bytes"] > 2**20 for row in result.rows)
    assert all(0 < loss < 100 for loss in result.details["losses"].values())
    for name in result.details["pictures"]:
        assert PIL_Image.open(output / name).size == (64, 64)
    assert "random, seeded" in full_size_cpu.table(result)
    capsys.readouterr()


def test_too_few_photographs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_photographs(tmp_path, count=1)
    assert full_size_cpu.main(["--images", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    assert "2 are needed" in capsys.readouterr().err


def test_the_committed_result_has_every_stage() -> None:
    result = read(RESULTS / "full_size_cpu.json", "full_size_cpu", full_size_cpu.StageRow)
    assert len(result.rows) == 18
    assert "random sample: AdamW" in full_size_cpu.table(result)
