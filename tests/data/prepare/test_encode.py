"""Shards of pictures and of moments made encoded shards: what is kept, and how well."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from sd_perf.config import Config
from sd_perf.data.batch import Batch, LoaderOptions
from sd_perf.data.images import load_picture
from sd_perf.data.loaders.portable import PortableLoader
from sd_perf.data.prepare import encode
from sd_perf.data.prepare.encode import ShardEncoder
from sd_perf.data.prepare.scenes import render
from sd_perf.data.samples import SampleReader
from sd_perf.data.shard_writer import ShardWriter
from sd_perf.data.shards import ShardIndex
from sd_perf.errors import DataError
from sd_perf.models.readers import read_encoder
from tests.small_run import small_config

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")
ROOT = Path(__file__).parents[3]
AUTOENCODER = ROOT / "assets" / "tiny" / "autoencoder.safetensors"
CAPTIONS = ["one", "", "two", "one", "", "three", "two", ""]
BAD = 6
TOKENS, WIDTH, SIDE = 3, 16, 8


def config_of(folder: Path, format: str = "encoded", **data) -> Config:
    """The small run on this folder, with keys of `data` changed."""
    data = {
        "format": format,
        "path": str(folder),
        "context": "precomputed",
        "allow_empty_captions": True,
        "max_bad_samples": 1,
        **data,
    }
    return small_config(folder / "run", data=data, text_encoder={"weights": "random"})


def states_of(caption: str) -> np.ndarray:
    """Text states that float16 does not hold."""
    return np.full((TOKENS, WIDTH), (1 + len(caption)) / 3, np.float32)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Moments shards of two, with text states; one sample has moments of NaN."""
    draws = np.random.default_rng(0)
    with ShardWriter(tmp_path / "source", samples_per_shard=5) as writer:
        for number, caption in enumerate(CAPTIONS):
            moments = draws.normal(size=(8, SIDE, SIDE)).astype(np.float32)
            moments[0, 0, 0] = np.nan if number == BAD else 0.1
            writer.write(moments, caption, context=states_of(caption))
    return tmp_path / "source"


def encoder(config: Config, source: Path, source_format: str = "moments") -> ShardEncoder:
    is_copied = source_format == "moments"
    cpu = torch.device("cpu")
    return ShardEncoder(
        config, source, source_format, copy_text=is_copied, device=cpu, batch_size=3
    )


def epoch(config: Config, samples: int) -> Batch:
    options = LoaderOptions(3, samples, samples, context_dim=WIDTH)
    return next(PortableLoader(config.data, options).batches(0))


def test_an_epoch_is_the_same_but_for_rounding(source, tmp_path):
    """Order, captions, text states and the successor of the bad sample."""
    config = config_of(tmp_path / "encoded")
    encoder(config, source).run()
    before = epoch(config_of(source, "moments"), len(CAPTIONS))
    after = epoch(config, len(CAPTIONS))
    assert after.moments.dtype == after.context.dtype == torch.float16
    assert torch.equal(after.moments, before.moments.half())
    assert torch.equal(after.context, before.context.half())
    assert after.captions == before.captions
    assert [bad.sample_index for bad in after.replacements] == [
        bad.sample_index for bad in before.replacements
    ]
    assert len(after.replacements) == 1


def test_the_file_is_a_safetensors_file(source, tmp_path):
    """As any program reads it, with the states of each caption once, the empty one among them."""
    encoder(config_of(tmp_path / "encoded"), source).run()
    arrays = safetensors.numpy.load_file(tmp_path / "encoded" / "00000.safetensors")
    keys = arrays["keys"].tobytes().decode()
    assert keys == "".join(f"{number:09d}" for number in range(5))
    assert arrays["moments"].dtype == np.float16 and arrays["moments"].shape == (5, 8, SIDE, SIDE)
    texts = list(dict.fromkeys(CAPTIONS[:5]))
    assert arrays["context"].shape == (3, TOKENS, WIDTH)
    for row, caption in enumerate(CAPTIONS[:5]):
        states = arrays["context"][arrays["states"][row]]
        np.testing.assert_array_equal(states, states_of(caption).astype(np.float16))
        assert arrays["states"][row] == texts.index(caption)
        begin = arrays["caption_ends"][row - 1] if row else 0
        text = arrays["captions"][begin : arrays["caption_ends"][row]]
        assert text.tobytes().decode() == caption


def test_measured_errors(source, tmp_path):
    found = encoder(config_of(tmp_path / "encoded"), source)
    found.run()
    assert (found.total.samples, found.total.bad) == (len(CAPTIONS), 1)
    index = ShardIndex.open(source)
    config = config_of(source, "moments")
    reader = SampleReader(index, config.data, 4, WIDTH)
    exact = np.stack([reader.read(i).moments for i in range(len(CAPTIONS)) if i != BAD])
    error = exact.astype(np.float16).astype(np.float64) - exact
    moments = found.total.moments
    assert moments.worst == np.abs(error).max() > 0
    relative = np.sqrt(np.square(error).mean() / np.square(exact, dtype=np.float64).mean())
    assert moments.relative == pytest.approx(relative, rel=1e-6)
    assert 1e-5 < moments.relative < 2**-11
    assert 0 < found.total.context.worst < 2**-10


def test_it_goes_on_where_it_stopped(source, tmp_path, monkeypatch):
    config = config_of(tmp_path / "encoded")
    first = encoder(config, source)
    first.run(rank=1, size=2)
    assert first.missing() == 1
    with pytest.raises(DataError, match=r"00001\.safetensors is shard 2 of 2 and stands at place"):
        ShardIndex.open(tmp_path / "encoded", format="encoded")
    again = encoder(config, source)
    done = []
    encode = again._encode
    monkeypatch.setattr(again, "_encode", lambda number: done.append(number) or encode(number))
    again.run()
    assert done == [0] and again.missing() == 0
    whole = encoder(config_of(tmp_path / "whole"), source)
    whole.run()
    assert again.total == whole.total
    for name in ("00000.safetensors", "00001.safetensors"):
        assert (tmp_path / "encoded" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes()


def test_a_shard_of_other_options_is_not_taken_for_done(source, tmp_path):
    encoder(config_of(tmp_path / "encoded"), source).run()
    other = config_of(tmp_path / "encoded", context_tokens=4)
    with pytest.raises(DataError, match=r"encoded otherwise \(context \[3, 16\], here \[4, "):
        encoder(other, source).run()
    path = tmp_path / "encoded" / "00000.safetensors"
    path.write_bytes(path.read_bytes().replace(b"bad", b"mad"))
    with pytest.raises(
        DataError, match=r"00000\.safetensors is damaged \(it lacks 'bad'\); remove"
    ):
        encoder(config_of(tmp_path / "encoded"), source).run()
    path.write_bytes(b"cut")
    with pytest.raises(DataError, match="no encoded shard"):
        encoder(config_of(tmp_path / "encoded"), source).run()


def test_a_shard_of_another_source_is_not_taken_for_done(source, tmp_path):
    config = config_of(tmp_path / "encoded")
    encoder(config, source).run()
    other = tmp_path / "other"
    other.mkdir()
    for name, taken in (("00000", "00001"), ("00001", "00000")):
        shutil.copy(source / f"{taken}.tar", other / f"{name}.tar")
    with pytest.raises(DataError, match=r"00000\.safetensors: holds other samples than"):
        encoder(config, other).run()


def test_nothing_is_left_of_a_shard_that_fails(source, tmp_path):
    config = config_of(tmp_path / "encoded", max_bad_samples=0)
    with pytest.raises(DataError, match=r"1 samples cannot .*sample 000010001 in 00001\.tar: mom"):
        encoder(config, source).run()
    assert [path.name for path in (tmp_path / "encoded").iterdir()] == ["00000.safetensors"]


def test_moments_beyond_float16(tmp_path):
    with ShardWriter(tmp_path / "source") as writer:
        for size in (1e5, 1):
            writer.write(np.full((8, SIDE, SIDE), size), "a", context=states_of("a"))
    found = encoder(config_of(tmp_path / "encoded"), tmp_path / "source")
    found.run()
    assert found.total.bad == 1 and found.total.moments.errors == 0


def test_pictures(tmp_path):
    """As `data prepare` and the training step encode them; a bad one keeps its place."""
    pictures = [as_png(number) for number in range(4)]
    with ShardWriter(tmp_path / "raw") as writer:
        for number, png in enumerate(pictures):
            png = b"no picture" if number == 1 else png
            writer.write_files({"png": png, "txt": f"caption {number}".encode()})
    options = {"autoencoder": str(AUTOENCODER), "image_range": "benchmark", "context": "open_clip"}
    config = config_of(tmp_path / "encoded", **options)
    encoder(config, tmp_path / "raw", "raw").run()
    arrays = safetensors.numpy.load_file(tmp_path / "encoded" / "00000.safetensors")
    assert "context" not in arrays
    pixels = torch.stack([load_picture(png, 8 * SIDE, "benchmark") for png in pictures])
    expected = read_encoder(AUTOENCODER)(pixels).numpy()
    assert np.isnan(arrays["moments"][1]).all()
    good = [0, 2, 3]
    np.testing.assert_allclose(arrays["moments"][good], expected[good], rtol=2**-11, atol=1e-5)


def as_png(number: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(render(0, number).image).save(stream, format="png")
    return stream.getvalue()


def test_text_that_cannot_be_copied(source, tmp_path):
    config = config_of(tmp_path / "encoded")
    with pytest.raises(DataError, match="raw shards hold no text states; take --text encode"):
        ShardEncoder(
            config, source, "raw", copy_text=True, device=torch.device("cpu"), batch_size=3
        )
    with ShardWriter(tmp_path / "bare") as writer:
        writer.write(np.zeros((8, SIDE, SIDE)), "a")
    with pytest.raises(DataError, match=r"00000\.tar: holds samples without text states; take"):
        encoder(config, tmp_path / "bare").run()


def test_the_tower_encodes_each_caption_once(source, tmp_path, monkeypatch):
    asked: list[str] = []

    def tower(captions: list[str]) -> torch.Tensor:
        asked.extend(captions)
        return torch.stack([torch.from_numpy(states_of(caption)) for caption in captions])

    monkeypatch.setattr(encode, "build_text_encoder", lambda config, device: tower)
    config, cpu = config_of(tmp_path / "encoded"), torch.device("cpu")
    ShardEncoder(config, source, "moments", copy_text=False, device=cpu).run()
    assert asked == ["one", "", "two", *dict.fromkeys(CAPTIONS[5:])]
    context = epoch(config, len(CAPTIONS)).context
    before = epoch(config_of(source, "moments"), len(CAPTIONS)).context
    assert torch.equal(context, before.half())
