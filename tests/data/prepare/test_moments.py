"""From captioned images to moments shards, with a stand-in and with a real autoencoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sd_perf.config import DataConfig
from sd_perf.data.batch import LoaderOptions
from sd_perf.data.images import load_image
from sd_perf.data.loaders.portable import PortableLoader
from sd_perf.data.prepare.framing import Framing
from sd_perf.data.prepare.image_folder import read_images
from sd_perf.data.prepare.moments import prepare_moments
from sd_perf.data.prepare.pictures import read_pictures
from sd_perf.data.shards import ShardIndex
from sd_perf.errors import DataError
from sd_perf.models.onnx_autoencoder import OnnxDecoder, OnnxEncoder

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")


def encoder(images: torch.Tensor) -> torch.Tensor:
    """Stands in for an autoencoder: pooled colours and their range."""
    pooled = F.avg_pool2d(images, 8)
    return torch.cat([pooled, pooled, pooled[:, :2]], dim=1)


def text_encoder(captions: list[str]) -> torch.Tensor:
    return torch.tensor([[[float(len(caption))] * 4] * 3 for caption in captions])


def prepare(samples, encoder, folder: Path, size: int, **options) -> int:
    pictures = read_pictures(samples, Framing(size), threads=2)
    return prepare_moments(pictures, encoder, folder, size, **options)


def batch_of(folder: Path, size: int, count: int, **fields):
    config = DataConfig(
        path=str(folder), latent_size=size // 8, **{"context": "open_clip", **fields}
    )
    split = {"global_batch_size": count, "micro_batch_size": count}
    return next(PortableLoader(config, LoaderOptions(seed=0, context_dim=4, **split)).batches(0))


def test_moments_of_photographs(photographs, tmp_path):
    samples = read_images(photographs)
    assert prepare(samples, encoder, tmp_path / "out", 16, batch_size=2) == 3
    batch = batch_of(tmp_path / "out", 16, 3)
    for moments, caption in zip(batch.moments, batch.captions, strict=True):
        number = int(caption.removeprefix("picture "))
        tolerance = 0.03 if number == 1 else 1e-6  # JPEG
        assert abs(float(moments[0].mean()) - (50 * number / 255 * 2 - 1)) < tolerance
    index = ShardIndex.open(tmp_path / "out")
    assert index.samples["context_size"].max() == 0
    raw = (tmp_path / "out" / "00000.tar").read_bytes()
    assert b'{"file": "a.png", "width": 40, "flickr_url": "u"}' in raw


def test_the_benchmarks_pixel_range_and_more_captions(photographs, tmp_path):
    samples = read_images(photographs)
    options = {"image_range": "benchmark", "captions_per_image": 2, "samples_per_shard": 4}
    assert (
        prepare(samples, encoder, tmp_path / "out", 16, text_encoder=text_encoder, **options) == 6
    )
    batch = batch_of(tmp_path / "out", 16, 6, context="precomputed", context_tokens=3)
    assert sorted(batch.captions) == sorted(
        caption for sample in samples for caption in sample.captions
    )
    for moments, caption, context in zip(batch.moments, batch.captions, batch.context, strict=True):
        assert abs(float(moments[0].mean()) - 50 * int(caption[-1]) / 255) < 0.02
        assert (context == len(caption)).all()


def test_undecodable_image(photographs, tmp_path):
    content = (photographs / "b.jpg").read_bytes()
    for damaged in (b"no picture", content[: len(content) // 2], b""):
        (photographs / "b.jpg").write_bytes(damaged)
        samples = read_images(photographs)
        with pytest.raises(DataError, match=r"captions\.jsonl line 2: .*b\.jpg cannot be decoded"):
            prepare(samples, encoder, tmp_path / "out", 16)
    assert list((tmp_path / "out").iterdir()) == []


def test_all_bad_images_are_named_at_once(photographs, tmp_path):
    for name in ("a.png", "b.jpg"):
        (photographs / name).write_bytes(b"no picture")
    samples = read_images(photographs)
    for limit in (0, 1):
        with pytest.raises(DataError, match=rf"^2 images .*_samples \({limit}\); ") as info:
            prepare(samples, encoder, tmp_path / "out", 16, batch_size=1, max_bad_samples=limit)
        assert all(f"line {number}: " in str(info.value) for number in (1, 2))
        assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_bad_images_are_left_out_up_to_the_limit(photographs, tmp_path, batch_size):
    (photographs / "b.jpg").write_bytes(b"no picture")
    (photographs / "a.png").write_bytes(b"")
    samples = read_images(photographs)
    options = {"batch_size": batch_size, "max_bad_samples": 2}
    assert prepare(samples, encoder, tmp_path / "out", 16, **options) == 1
    listed = (tmp_path / "out" / "bad_images.jsonl").read_text().splitlines()
    errors = [json.loads(line)["error"] for line in listed]
    assert [name in error for name, error in zip(("a.png", "b.jpg"), errors, strict=True)] == [1, 1]
    assert batch_of(tmp_path / "out", 16, 1).captions[0] in samples[2].captions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"encoder": lambda images: images},
            r"line 1 to .*line 3: the encoder .* gives shape \(3, 3, 16, 16\)",
        ),
        ({"encoder": lambda images: encoder(images) / 0}, "encoder .* gives NaN or infinite"),
        (
            {"text_encoder": lambda captions: torch.zeros(len(captions), 4)},
            r"line 3: the text encoder .* shape \(3, 4\)",
        ),
        (
            {"text_encoder": lambda captions: torch.full((len(captions), 3, 4), 1e6)},
            "text encoder .* NaN or infinite",
        ),
        ({"size": 20}, "image size 20 .* multiple of 8"),
        ({"captions_per_image": 0}, "at least 1"),
    ],
)
def test_unusable_encoders_and_options(photographs, tmp_path, options, message):
    options = {"encoder": encoder, "size": 16, **options}
    with pytest.raises(DataError, match=message):
        prepare(read_images(photographs), folder=tmp_path / "out", **options)
    assert not list(tmp_path.glob("out/*"))


def test_photographs_through_a_real_autoencoder(real_data, tmp_path):
    pytest.importorskip("onnxruntime", reason="needs onnxruntime")
    models = {path.name.lower(): path for path in (real_data / "vaelight").glob("*.onnx")}
    encode = OnnxEncoder(models["vaeencoder.onnx"], threads=1)
    decode = OnnxDecoder(models["vaepreview.onnx"], threads=1)
    samples = read_images(real_data / "coco_ccby" / "images")[:6]
    assert prepare(samples, encode, tmp_path / "out", 256, samples_per_shard=4) == 6
    batch = batch_of(tmp_path / "out", 256, 6)
    pictures = {sample.captions[0]: load_image(sample.path, 256) * 2 - 1 for sample in samples}
    images = torch.stack([pictures[caption] for caption in batch.captions])
    spread = 0.18215 * batch.moments[:, :4].transpose(0, 1).flatten(1).std(dim=1)
    assert ((spread > 0.6) & (spread < 1.3)).all()
    decoded = decode(batch.moments[:, :4])
    assert decoded.shape == images.shape and decoded.abs().max() <= 1
    assert float(decode(10 * batch.moments[:, :4]).abs().max()) == 1
    error = (decoded - images).square().mean(dim=(1, 2, 3))
    assert float((10 * torch.log10(4 / error)).mean()) > 21
    with pytest.raises(DataError, match="does not take an input"):
        encode(torch.zeros(1, 4, 64, 64))
    with pytest.raises(DataError, match="another encoder"):
        OnnxEncoder(models["vaepreview.onnx"])(torch.zeros(1, 4, 8, 8))
