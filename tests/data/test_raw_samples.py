"""Samples of raw shards: pictures of every kind, bad ones and their successors."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch

from sd_perf.config import DataConfig
from sd_perf.data import images, samples
from sd_perf.data.batch import LoaderOptions
from sd_perf.data.images import load_picture
from sd_perf.data.loaders.portable import PortableLoader
from sd_perf.data.samples import SampleReader
from sd_perf.data.shards import ShardIndex
from sd_perf.errors import BadSampleError, DataError
from tests.data.test_shards import write_tar

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")
SIDE = 2
PIXELS = 8 * SIDE


def picture(number: int = 0, format: str = "png", size: tuple[int, int] = (20, 30)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, (number, 100, 200)).save(stream, format=format)
    return stream.getvalue()


def config_of(folder: Path, **changes) -> DataConfig:
    fields = {"format": "raw", "path": str(folder), "latent_size": SIDE, "autoencoder": "a.ckpt"}
    return DataConfig(**fields | changes)


def write(folder: Path, *contents: bytes, extension: str = "jpg") -> Path:
    """A shard of samples 0, 1, ... with these image files."""
    files = [(f"{i:03d}.{extension}", content) for i, content in enumerate(contents)]
    files += [(f"{i:03d}.txt", f"caption {i}".encode()) for i in range(len(contents))]
    write_tar(folder / "0.tar", [*files, ("000.json", b"{}")])
    return folder


def reader(folder: Path, **changes) -> SampleReader:
    config = config_of(folder, **changes)
    return SampleReader(ShardIndex.open(folder, format="raw"), config, 4, 5)


@pytest.mark.parametrize(
    ("extension", "format"), [("jpg", "jpeg"), ("jpeg", "jpeg"), ("PNG", "png"), ("webp", "webp")]
)
def test_pictures_of_every_kind(tmp_path, extension, format):
    content = picture(7, format)
    for image_range in ("benchmark", "correct"):
        reads = reader(write(tmp_path, content, extension=extension), image_range=image_range)
        sample = reads.read(0)
        assert sample.moments is sample.context is None and sample.caption == "caption 0"
        right = load_picture(content, PIXELS, image_range)
        assert torch.equal(torch.from_numpy(sample.pixels), right)


def test_the_first_of_several_pictures(tmp_path):
    files = [("a.webp", picture(1, "webp")), ("a.jpg", picture(2, "jpeg")), ("a.txt", b"x")]
    write_tar(tmp_path / "0.tar", files)
    right = load_picture(files[1][1], PIXELS, "correct")
    assert torch.equal(torch.from_numpy(reader(tmp_path).read(0).pixels), right)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot identify image file"),
        (b"no picture", "cannot identify image file"),
        (picture(format="jpeg", size=(90, 90))[:-60], "image file is truncated"),
        (picture(size=(1000, 10)), "one side is over 32 times"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "cannot identify"),
    ],
)
def test_bad_pictures(tmp_path, content, reason):
    with pytest.raises(BadSampleError, match=rf"^the image cannot be decoded .*{reason}.*\)$"):
        reader(write(tmp_path, content)).read(0)


def test_a_picture_of_too_many_bytes_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "MAX_IMAGE_BYTES", 50)
    with pytest.raises(BadSampleError, match=r"^picture has [0-9]+ bytes, more than 50$"):
        reader(write(tmp_path, picture())).read(0)


def test_a_picture_of_too_many_pixels_is_not_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 500)
    with pytest.raises(BadSampleError, match="it has 20 x 30 pixels, more than 500"):
        reader(write(tmp_path, picture())).read(0)


def test_a_bad_picture_is_replaced_by_its_successor(tmp_path):
    contents = [picture(i) for i in range(6)]
    options = LoaderOptions(3, 6, 6)
    good = next(PortableLoader(config_of(write(tmp_path / "a", *contents)), options).batches(0))
    contents[2] = b"no picture"
    folder = write(tmp_path / "b", *contents)
    with pytest.raises(BadSampleError, match=r"sample 002 in 0\.tar: .*; mend it, or set data"):
        next(PortableLoader(config_of(folder), options).batches(0))
    batch = next(PortableLoader(config_of(folder, max_bad_samples=1), options).batches(0))
    place = good.captions.index("caption 2")
    assert [bad.sample_index for bad in batch.replacements] == [place]
    for row in range(6):
        if row != place:
            assert torch.equal(batch.pixels[row], good.pixels[row])
    assert batch.moments is None and batch.pixels.shape == (6, 3, PIXELS, PIXELS)
    # the next of the order; from the last place on, that of the next epoch
    if place < 5:
        assert batch.captions[place] == good.captions[place + 1]


def test_samples_are_in_the_order_of_keys(tmp_path):
    """As in the moments shards that the benchmark made of img2dataset's."""
    files = [(f"{key}.{kind}", b"x") for key in ("002", "000", "001") for kind in ("jpg", "txt")]
    write_tar(tmp_path / "0.tar", files)
    index = ShardIndex.open(tmp_path, format="raw")
    assert index.samples["key"].tolist() == [b"000", b"001", b"002"]
    npy = [(name.replace("jpg", "npy"), content) for name, content in sorted(files)]
    write_tar(tmp_path / "m" / "0.tar", npy)
    moments = ShardIndex.open(tmp_path / "m")
    assert moments.keys_fingerprint == index.keys_fingerprint
    assert moments.fingerprint != index.fingerprint


def test_shards_of_the_other_format_are_named(tmp_path):
    folder = write(tmp_path, picture())
    with pytest.raises(DataError, match=r"000 has no \.npy; .*are read with data\.format raw"):
        ShardIndex.open(folder)
    write_tar(tmp_path / "m" / "0.tar", [("a.npy", b"x"), ("a.txt", b"x")])
    with pytest.raises(DataError, match=r"a has no \.jpg or .* read with data\.format moments"):
        ShardIndex.open(tmp_path / "m", format="raw")
    write_tar(tmp_path / "n" / "0.tar", [("a.jpg", b"x"), ("b.gif", b"x"), ("b.txt", b"x")])
    with pytest.raises(DataError, match=r"a has no \.txt; every sample needs \.jpg or"):
        ShardIndex.open(tmp_path / "n", format="raw")


def test_a_shard_that_shrinks_grows_or_vanishes(tmp_path):
    folder = write(tmp_path, picture(1), picture(2))
    shard, reads = folder / "0.tar", reader(folder)
    reads.require_unchanged()
    with shard.open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(DataError, match=r"0\.tar was written to while it was read"):
        reads.require_unchanged()
    again = reader(folder)
    shard.rename(folder / "moved")  # what is open is read on
    assert again.read(1).caption == "caption 1"
    os.truncate(folder / "moved", 600)
    with pytest.raises(BadSampleError, match=r"picture ends after .* bytes; the shard shrank"):
        again.read(0)
    with pytest.raises(DataError, match=r"holds no \*\.tar file"):
        reader(folder)
