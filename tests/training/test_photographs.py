"""Real photographs from end to end, with the tiny world's autoencoder and with one of Stable
Diffusion's own space."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sd_perf.cli import main

ROOT = Path(__file__).parents[2]
SMALL = (
    "--training.cpu-threads",
    "1",
    "--training.device",
    "cpu",
    "--logging.every-steps",
    "1",
    "--model.model-channels",
    "32",
    "--optimizer.base-learning-rate",
    "1e-4",
    "--optimizer.warmup-steps",
    "5",
    "--text-encoder.model",
    str(ROOT / "assets/tiny/clip.json"),
    "--text-encoder.weights",
    str(ROOT / "assets/tiny/clip.safetensors"),
)


def sd_perf(*arguments: object) -> None:
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    assert left.value.code == 0


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "batch"), [("smoke", 8), ("photographs", 4)])
def test_loss_falls_on_photographs(preset, batch, real_data, tmp_path):
    lines = (real_data / "coco_ccby" / "captions.jsonl").read_text().splitlines()[:24]
    (tmp_path / "captions.jsonl").write_text("\n".join(lines) + "\n")
    images, config = real_data / "coco_ccby" / "images", ROOT / "configs" / f"{preset}.yaml"
    encoders = {"smoke": ROOT / "assets/tiny/autoencoder.safetensors"}
    autoencoder = encoders.get(preset, real_data / "vaelight" / "VAEencoder.onnx")
    folders = ("--data.path", tmp_path / "shards", "--run.dir", tmp_path / "run")
    sd_perf(
        "data",
        "prepare",
        "--config",
        config,
        "--images",
        images,
        "--captions",
        tmp_path / "captions.jsonl",
        "--autoencoder",
        autoencoder,
        *folders,
        *SMALL,
    )
    sd_perf(
        "train",
        "--config",
        config,
        *folders,
        *SMALL,
        "--mlperf.division",
        "none",
        "--training.global-batch-size",
        batch,
        "--training.max-samples",
        60 * batch,
    )
    losses = [
        json.loads(line)["loss"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(losses) == 60
    assert sum(losses[-15:]) < 0.9 * sum(losses[:15])
