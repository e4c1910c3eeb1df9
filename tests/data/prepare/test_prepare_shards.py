"""Shards made as a config will read them."""

from __future__ import annotations

import dataclasses
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from sd_perf.config import Config, DataConfig, TextEncoderConfig, UNetConfig
from sd_perf.data.images import load_image
from sd_perf.data.prepare.prepare_shards import prepare_shards, survey_images
from sd_perf.data.prepare.scenes import write_scenes
from sd_perf.errors import ConfigError, DataError
from sd_perf.models.build import build_text_encoder
from sd_perf.models.readers import read_encoder

ROOT = Path(__file__).parents[3]
AUTOENCODER = ROOT / "assets" / "tiny" / "autoencoder.safetensors"
TEXT = TextEncoderConfig(model=str(ROOT / "configs" / "text_tiny.json"), weights="random")


def read_arrays(folder: Path, extension: str) -> np.ndarray:
    """Arrays of that extension in the shards' order, stacked."""
    shards = sorted(folder.glob("*.tar"))
    return np.stack([array for shard in shards for array in in_shard(shard, extension)])


def in_shard(path: Path, extension: str) -> list[np.ndarray]:
    with tarfile.open(path) as tar:
        members = [member for member in tar if member.name.partition(".")[2] == extension]
        files = [tar.extractfile(member) for member in members]
        return [np.load(io.BytesIO(file.read())) for file in files if file is not None]


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    write_scenes(tmp_path / "scenes", 3, seed=0, uncaptioned_every=3)
    return tmp_path / "scenes"


def config_of(shards: Path, **changes: object) -> Config:
    data = DataConfig(path=str(shards), latent_size=8, allow_empty_captions=True)
    model = UNetConfig(context_dim=128)  # the width of TEXT
    return Config(model=model, data=dataclasses.replace(data, **changes), text_encoder=TEXT)


def prepare(config: Config, images: Path, **options: object) -> int:
    return prepare_shards(config, survey_images(config, images), AUTOENCODER, **options)


def test_moments_and_files(scenes, tmp_path):
    config = config_of(tmp_path / "shards")
    assert prepare(config, scenes, samples_per_shard=2) == 3
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 2
    images = torch.stack([load_image(scenes / f"{i:06d}.png", 64) for i in range(3)])
    expected = read_encoder(AUTOENCODER)(2 * images - 1).numpy()
    moments = read_arrays(tmp_path / "shards", "npy").reshape(expected.shape)
    np.testing.assert_allclose(moments, expected, rtol=1e-5, atol=1e-5)


def test_the_benchmarks_pixel_range(scenes, tmp_path):
    config = config_of(tmp_path / "shards")
    data = dataclasses.replace(config.data, image_range="benchmark")
    config = dataclasses.replace(config, data=data)
    prepare(config, scenes)
    images = torch.stack([load_image(scenes / f"{i:06d}.png", 64) for i in range(3)])
    expected = read_encoder(AUTOENCODER)(images).numpy()
    moments = read_arrays(tmp_path / "shards", "npy").reshape(expected.shape)
    np.testing.assert_allclose(moments, expected, rtol=1e-5, atol=1e-5)


def test_bad_pictures_up_to_the_limit_of_the_config(scenes, tmp_path):
    (scenes / "000001.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"^1 image cannot be used, .*000001\.png cannot be dec"):
        prepare(config_of(tmp_path / "shards"), scenes)
    config = config_of(tmp_path / "shards", max_bad_samples=1)
    assert prepare(config, scenes) == 2


def test_text_states_where_they_are_precomputed(scenes, tmp_path):
    config = config_of(tmp_path / "shards", context="precomputed")
    prepare(config, scenes)
    states = read_arrays(tmp_path / "shards", "context.npy")
    empty = build_text_encoder(config, torch.device("cpu"))([""]).half().numpy()
    np.testing.assert_allclose(states[0], empty[0], rtol=2e-3, atol=2e-3)
    assert not np.allclose(states[1], states[0], atol=1e-2)


def test_no_folder_to_write_to(scenes):
    config = Config(data=DataConfig(format="synthetic"))
    with pytest.raises(ConfigError, match=r"^data\.path: '' .* the folder to write the shards to$"):
        prepare(config, scenes)
