"""Pictures of a user's prompts are those of the run's weights and of the given options."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from sd_perf.config import SamplingConfig
from sd_perf.errors import CheckpointError, ConfigError, UserError
from sd_perf.evaluation import draw
from sd_perf.evaluation.draw import draw_prompts
from sd_perf.evaluation.generate import generate
from sd_perf.models.build import build_sampling_unet, build_text_encoder
from sd_perf.models.readers import read_decoder
from sd_perf.runs.checkpoints import CheckpointStore, load_component
from sd_perf.runs.folder import read_run_config
from tests.small_run import TREE, train

ROOT = Path(__file__).parents[2]
AUTOENCODER = ROOT / "assets" / "tiny" / "autoencoder.safetensors"
PROMPTS = ["a cat", "a dog"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of two steps; its sampling is three steps of guidance 2."""
    folder = tmp_path_factory.mktemp("drawn")
    tree = {
        **TREE,
        "model": {**TREE["model"], "context_dim": 128},
        "training": {**TREE["training"], "max_samples": 8},
        "checkpoint": {"every_samples": 4},
        "text_encoder": {"model": str(ROOT / "configs" / "text_tiny.json"), "weights": "random"},
        "sampling": {"steps": 3, "guidance_scale": 2.0},
    }
    (folder / "text.yaml").write_text(yaml.safe_dump(tree))
    train(folder / "text.yaml", folder / "run")
    return folder / "run"


def expected(run: Path, seed: int, sampling: SamplingConfig) -> np.ndarray:
    """Pictures (2, H, W, 3) of 8 bits, drawn with the newest checkpoint by `generate` itself."""
    config = dataclasses.replace(read_run_config(run), sampling=sampling)
    device = torch.device("cpu")
    unet, text_encoder = build_sampling_unet(config, device), build_text_encoder(config, device)
    newest = CheckpointStore(run / "checkpoints").newest()
    assert newest is not None
    unet.load_state_dict(load_component(newest, "model"))
    batches = generate(unet, text_encoder, read_decoder(AUTOENCODER), PROMPTS, config, seed)
    pictures = torch.cat(list(batches))
    return (pictures * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize(
    ("options", "sampling"),
    [
        ({}, SamplingConfig(steps=3, guidance_scale=2.0)),
        ({"steps": 2}, SamplingConfig(steps=2, guidance_scale=2.0)),
        ({"guidance_scale": 1.0}, SamplingConfig(steps=3, guidance_scale=1.0)),
    ],
    ids=["as the run says", "steps", "guidance_scale"],
)
def test_pictures(options, sampling, run, tmp_path):
    paths = draw_prompts(run, PROMPTS, AUTOENCODER, tmp_path / "pictures", seed=5, **options)
    assert [path.name for path in paths] == ["0000_a_cat.png", "0001_a_dog.png"]
    pictures = np.stack([np.array(Image.open(path)) for path in paths])
    np.testing.assert_array_equal(pictures, expected(run, 5, sampling))


def test_no_picture_of_nan(run, tmp_path, monkeypatch):
    state, model = draw.read_unet(run)
    spoilt = {**state, "out.2.bias": torch.full_like(state["out.2.bias"], float("nan"))}
    monkeypatch.setattr(draw, "read_unet", lambda source, ema: (spoilt, model))
    with pytest.raises(CheckpointError, match=r"samples_\d+: 2 of 2 latents .* NaN or infinite"):
        draw_prompts(run, PROMPTS, AUTOENCODER, tmp_path / "pictures")
    assert not list(tmp_path.glob("pictures/*"))


def test_what_cannot_be_drawn(run, tmp_path):
    with pytest.raises(UserError, match=r"^--prompt: give one or more prompts$"):
        draw_prompts(run, [], AUTOENCODER, tmp_path / "pictures")
    with pytest.raises(ConfigError, match=r"^sampling\.steps: 2000 .* at most diffusion"):
        draw_prompts(run, PROMPTS, AUTOENCODER, tmp_path / "pictures", steps=2000)
    with pytest.raises(UserError, match=r"^--autoencoder: give one; .* names none$"):
        draw_prompts(run, PROMPTS, None, tmp_path / "pictures")
    assert not (tmp_path / "pictures").exists()
