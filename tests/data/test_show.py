"""What `data show` picks of a folder, and the pictures it makes of samples."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch

from sd_perf.config import Config
from sd_perf.data.laion.convert import convert
from sd_perf.data.prepare.scenes import render, write_scene_shards, write_scenes
from sd_perf.data.show import examples
from sd_perf.errors import DataError
from sd_perf.models.readers import read_decoder
from tests.cli.bad_input import write_shards

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")
AUTOENCODER = Path(__file__).parents[2] / "assets" / "tiny" / "autoencoder.safetensors"


def shown(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg))).astype(np.float32)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    write_scene_shards(tmp_path / "raw", 5, seed=1)
    return tmp_path / "raw"


@pytest.mark.parametrize("image_range", ["benchmark", "correct"])
def test_decoded_moments_are_the_pictures(raw, tmp_path, image_range):
    """In the colours of the picture, whichever range the encoder got."""
    out = tmp_path / "moments"
    options = {"pixels": 64, "devices": ["cpu"], "image_range": image_range}
    convert(raw, out, AUTOENCODER, **options)
    found = list(examples(out, Config(), 3, read_decoder(AUTOENCODER)))
    assert [example.name for example in found] == [
        f"00000{number:04} in 00000.tar" for number in (0, 2, 4)
    ]
    for example, number in zip(found, (0, 2, 4), strict=True):
        scene = render(1, number)
        assert example.caption == scene.caption
        assert example.remark.startswith("64x64 pixels, decoded")
        assert ("[0, 1]" in example.remark) == (image_range == "benchmark")
        picture = shown(example.jpeg)
        other = (picture + 255) / 2 if image_range == "benchmark" else 2 * picture - 255
        error = np.abs(picture - scene.image).mean()
        assert error < 40 and error < np.abs(other.clip(0, 255) - scene.image).mean()


def test_moments_without_a_decoder(raw, tmp_path):
    convert(raw, tmp_path / "m", AUTOENCODER, pixels=64, devices=["cpu"], image_range="benchmark")
    [example] = examples(tmp_path / "m", Config(), 1)
    assert example.remark == "8x8 pixels, latents in false colours"
    assert 30 < shown(example.jpeg).mean() < 225


def test_raw_shards_and_folders_of_pictures(raw, tmp_path):
    write_scenes(tmp_path / "scenes", 2, seed=1)
    write_scenes(tmp_path / "bare", 2, seed=1)
    (tmp_path / "bare" / "captions.jsonl").unlink()
    for folder in (raw, tmp_path / "scenes", tmp_path / "bare"):
        example = next(examples(folder, Config(), 2))
        picture = torch.from_numpy(render(1, 0).image).float().numpy()
        small = shown(example.jpeg)[4::8, 4::8]  # the benchmark's 512 from 64 pixels
        assert np.abs(small - picture).mean() < 8
        assert example.caption == ("" if folder.name == "bare" else render(1, 0).caption)


def test_what_cannot_be_used_is_told(tmp_path):
    write_shards(tmp_path / "shards", bad={0})
    (tmp_path / "shards" / "00001.tar").write_bytes(b"no tar")
    bad, *_, unreadable = examples(tmp_path / "shards", Config(), 4)
    assert not bad.jpeg and "NaN" in bad.remark
    assert not unreadable.jpeg and "cannot be read as a tar file" in unreadable.remark
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds neither shards nor pictures"):
        list(examples(tmp_path / "empty", Config(), 4))
