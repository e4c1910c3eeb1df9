"""Raw shards: the same pictures as from a folder, and bad input."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from sd_perf.data.images import load_image
from sd_perf.data.prepare.captioned_images import load_captioned_image
from sd_perf.data.prepare.image_folder import read_images
from sd_perf.data.prepare.raw_shards import read_raw_shards
from sd_perf.data.prepare.scenes import write_scene_shards, write_scenes
from sd_perf.data.shard_writer import ShardWriter
from sd_perf.errors import DataError


def jpeg() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (40, 24), (200, 30, 90)).save(stream, format="jpeg")
    return stream.getvalue()


def write(folder, **files: bytes):
    with ShardWriter(folder) as writer:
        writer.write_files(files)
    return folder


def test_shards_hold_what_the_folder_holds(tmp_path):
    write_scenes(tmp_path / "folder", 6, seed=4, uncaptioned_every=3)
    write_scene_shards(tmp_path / "shards", 6, seed=4, uncaptioned_every=3)
    folder = read_images(tmp_path / "folder", allow_empty=True)
    shards = read_raw_shards(tmp_path / "shards", allow_empty=True)
    assert [image.captions for image in shards] == [image.captions for image in folder]
    assert shards[0].captions == ("",) and shards[1].captions != ("",)
    for ours, theirs in zip(shards, folder, strict=True):
        assert torch.equal(load_captioned_image(ours, 64), load_image(theirs.path, 64))


def test_jpeg_with_metadata_of_img2dataset(tmp_path):
    [image] = read_raw_shards(write(tmp_path, jpg=jpeg(), txt=b"a colour", json=b'{"NSFW": "?"}'))
    assert image.captions == ("a colour",) and load_captioned_image(image, 16).shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"txt": b"a"}, "000000000 needs an image .* it has txt"),
        ({"jpg": b"x"}, "000000000 needs an image .* and a .txt"),
        ({"jpg": b"x", "txt": b""}, "000000000: .*empty"),
        ({"jpg": b"x", "txt": bytes([255])}, "000000000: .*UTF-8"),
    ],
)
def test_bad_sample(files, sentence, tmp_path):
    with pytest.raises(DataError, match=sentence):
        read_raw_shards(write(tmp_path, **files))


def test_undecodable_image_is_named(tmp_path):
    [image] = read_raw_shards(write(tmp_path, jpg=b"no jpeg", txt=b"a"))
    with pytest.raises(DataError, match="sample 000000000: the image cannot be decoded"):
        load_captioned_image(image, 8)


def test_a_folder_is_read_as_what_it_holds(tmp_path):
    write_scenes(tmp_path, 2, seed=4)
    assert [image.place for image in read_images(tmp_path)] == [None, None]
    write_scene_shards(tmp_path, 3, seed=4)
    with pytest.raises(DataError, match=r"in two places, raw shards \(\*\.tar\) and .*captions\.j"):
        read_images(tmp_path)
    assert len(read_images(tmp_path, tmp_path / "captions.jsonl")) == 2
    (tmp_path / "captions.jsonl").unlink()
    assert all(image.place for image in read_images(tmp_path)) and len(read_images(tmp_path)) == 3


def test_no_shards(tmp_path):
    with pytest.raises(DataError, match="holds no raw shards"):
        read_raw_shards(tmp_path)
