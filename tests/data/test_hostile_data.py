"""Shards, captions and pictures that a stranger made: one sentence, and memory as promised."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from sd_perf.data.formats import MAX_IMAGE_BYTES
from sd_perf.data.images import MAX_PIXELS, load_image
from sd_perf.data.prepare.image_folder import read_images
from sd_perf.data.prepare.raw_shards import read_raw_shards
from sd_perf.data.samples import SampleReader
from sd_perf.data.shards import INDEX_NAME, ShardIndex
from sd_perf.errors import BadSampleError, DataError
from tests.data.test_shards import write_tar

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")
Image.init()  # its plugins, which it else imports where the first file cannot be opened
LITTLE = 4 * 2**20
"""bytes of memory that reading a hostile file may take"""


@pytest.fixture
def little_memory():
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < LITTLE


def add(path: Path, name: str, size: int) -> None:
    """Append a member of zero bytes, which takes no room on the disk, and end the tar file."""
    info = tarfile.TarInfo(name)
    info.size = size
    with path.open("ab") as stream:
        stream.write(info.tobuf(tarfile.GNU_FORMAT))
        stream.truncate(stream.tell() + -(-size // 512) * 512)


def end(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(bytes(1024))


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"npy": 1 << 33, "txt": 5, "context.npy": 9}, "moments is not a .npy array"),
        ({"txt": 1 << 33}, "caption has 8589934592 bytes, more than 4096"),
        ({"context.npy": 1 << 33}, "context is not a .npy array"),
    ],
)
def test_a_large_member_is_not_read(tmp_path, make_shards, little_memory, sizes, reason):
    config = make_shards(num=1)
    shard = Path(config.path) / "00000.tar"
    with tarfile.open(shard) as tar:
        good = {m.name.partition(".")[2]: tar.extractfile(m).read() for m in tar if m.isreg()}
    shard.unlink()
    small = {key: value for key, value in good.items() if key not in sizes}
    write_tar(shard, [(f"a.{key}", value) for key, value in small.items()])
    os.truncate(shard, sum(512 + -(-len(value) // 512) * 512 for value in small.values()))
    for key, size in sizes.items():
        add(shard, f"a.{key}", size)
    end(shard)
    # scanning looks at what follows a header, not at the member
    index = ShardIndex.open(config.path)
    with pytest.raises(BadSampleError, match=reason):
        SampleReader(index, config, 4, 5).read(0)


def test_values_beyond_the_shape_are_counted(make_shards):
    config = make_shards(num=1)
    shard = Path(config.path) / "00000.tar"
    stream = io.BytesIO()
    np.save(stream, np.zeros((1, 8, 2, 2), np.float32))
    write_tar(shard, [("a.npy", stream.getvalue() + bytes(100_000)), ("a.txt", b"x")])
    reader = SampleReader(ShardIndex.open(config.path), config, 4, 5)
    with pytest.raises(BadSampleError, match="moments has 100128 bytes of values, not 128"):
        reader.read(0)


def pax_header(kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_long_header_is_not_read(tmp_path, little_memory, kind):
    path = tmp_path / "0.tar"
    path.write_bytes(pax_header(kind, 1 << 33))
    os.truncate(path, 1 << 33)
    with pytest.raises(DataError, match=r"0\.tar cannot be read as a tar file \(a header claims"):
        ShardIndex.open(tmp_path)


@pytest.mark.parametrize("size", [-512, -1024, -(2**40)])
def test_a_tar_file_that_leads_back_ends(tmp_path, size):
    """tarfile of Python before 3.13.6 goes round such a file for ever."""
    info = tarfile.TarInfo("a.npy")
    info.pax_headers = {"size": str(size)}
    data = info.tobuf(tarfile.PAX_FORMAT)
    (tmp_path / "0.tar").write_bytes(data + bytes(1024))
    with pytest.raises(DataError, match=r"0\.tar (cannot be read|is truncated)"):
        ShardIndex.open(tmp_path)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE])
def test_a_link_is_no_sample(tmp_path, kind):
    path = write_tar(tmp_path / "0.tar", [("a.npy", b"x"), ("a.txt", b"x"), ("b.npy", b"x")])
    with tarfile.open(path, "a") as tar:
        info = tarfile.TarInfo("b.txt")
        info.type, info.linkname = kind, "a.txt"
        tar.addfile(info)
    with pytest.raises(DataError, match=r"0\.tar: b\.txt is a link, a device or a sparse file"):
        ShardIndex.open(tmp_path)


def test_a_second_archive_is_not_passed_over(tmp_path):
    first = write_tar(tmp_path / "0.tar", [("a.npy", b"x"), ("a.txt", b"x")])
    second = write_tar(tmp_path / "b" / "1.tar", [("b.npy", b"x"), ("b.txt", b"x")])
    first.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(
        DataError, match=r"0\.tar goes on behind the end of the archive at byte 2048"
    ):
        ShardIndex.open(tmp_path)


def test_files_that_a_mac_writes_are_passed_over(tmp_path):
    files = [("a.npy", b"x"), ("a.txt", b"x"), ("._a.npy", b"mac"), ("._a.txt", b"mac")]
    write_tar(tmp_path / "0.tar", files)
    (tmp_path / "._0.tar").write_bytes(b"mac")
    index = ShardIndex.open(tmp_path)
    assert index.shards == ["0.tar"] and index.samples["key"].tolist() == [b"a"]


def test_shards_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "0.tar")
    with pytest.raises(DataError, match=r"0\.tar: cannot be read \(it is a FIFO\)"):
        ShardIndex.open(tmp_path)
    (tmp_path / "0.tar").unlink()
    (tmp_path / "0.tar").symlink_to("0.tar")
    with pytest.raises(DataError, match=r"0\.tar cannot be read \(Too many levels of symbolic"):
        ShardIndex.open(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("shard", 7),
        ("shard", -1),
        ("moments_offset", -512),
        ("moments_offset", 2**62),
        ("caption_size", -1),
        ("caption_size", 2**62),
        ("context_size", 10**9),
    ],
)
def test_a_saved_index_names_places_within_the_shards(make_shards, field, value):
    folder = Path(make_shards().path)
    ShardIndex.open(folder)
    with np.load(folder / INDEX_NAME) as saved:
        arrays = {name: saved[name].copy() for name in saved.files}
    arrays["samples"][field][3] = value
    np.savez(folder / INDEX_NAME, **arrays)
    with pytest.raises(DataError, match=f"{INDEX_NAME} is not a shard index; delete it"):
        ShardIndex.open(folder)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("../a.png", "which lies outside of the folder"),
        ("b/../../a.png", "which lies outside of the folder"),
        ("/etc/passwd", "which lies outside of the folder"),
        ("._a.png", "which a Mac wrote"),
        ("b/._a.png", "which a Mac wrote"),
        ("a\0.png", "which no disk can hold"),
        ("\ud800.png", "which no disk can hold"),
        (300 * "x", "which no disk can hold"),
    ],
)
def test_a_captions_file_names_pictures_of_its_folder(tmp_path, file, reason):
    images = tmp_path / "images"
    images.mkdir()
    for place in (tmp_path / "a.png", images / "a.png", images / "._a.png"):
        place.write_bytes(b"x")
    lines = [{"file": "a.png", "caption": "x"}, {"file": file, "caption": "x"}]
    (images / "captions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=rf"captions\.jsonl line 2 names .*{reason}") as error:
        read_images(images)
    assert len(str(error.value)) < 900


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (100_000 * b"[", "nested deeper than 64"),
        (b'{"file": "a.png", "width": ' + 5000 * b"9" + b"}", "a number of 5000 digits"),
        (b'{"file": "a.png", "file": "b.png"}', "'file' is given twice"),
        (b'{"file": "a.png", "width": NaN}', "NaN is no number"),
        (2_000_000 * b"x", "line 1 has more than 1,048,576 bytes"),
    ],
)
def test_hostile_lines_of_captions(tmp_path, line, reason):
    (tmp_path / "captions.jsonl").write_bytes(line)
    with pytest.raises(DataError, match=reason) as error:
        read_images(tmp_path)
    assert len(str(error.value)) < 900


def png(width: int, height: int) -> bytes:
    """A PNG that claims a size, of which it holds a few bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        end = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + end

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(999))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((13_000, 13_000), f"13000 x 13000 pixels, more than {MAX_PIXELS:,}"),
        ((2**31 - 1, 2**31 - 1), "pixels"),
        ((1, 100_000), "1 x 100000 pixels: one side is over 32 times the other"),
        ((100_000, 1), "100000 x 1 pixels: one side is over 32 times"),
        ((0, 5), "cannot be decoded"),
        ((64, 64), "cannot be decoded"),
    ],
)
def test_pictures_are_not_decoded_before_their_size_is_known(tmp_path, little_memory, size, reason):
    (tmp_path / "a.png").write_bytes(png(*size))
    with pytest.raises(
        DataError, match=rf"a\.png cannot be decoded as an image .*{reason}|{reason}"
    ):
        load_image(tmp_path / "a.png", 8)


def test_a_picture_as_long_as_is_taken(tmp_path):
    Image.new("RGB", (320, 10), (255, 0, 0)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", 8).shape == (3, 8, 8)


def test_formats_that_start_programs_are_no_pictures(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    with pytest.raises(DataError, match="cannot be decoded"):
        load_image(tmp_path / "a.png", 8)


def test_a_picture_that_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: cannot be read \(it is a FIFO\)"):
        load_image(tmp_path / "a.png", 8)


def test_a_large_image_in_a_raw_shard_is_not_read(tmp_path, little_memory):
    path = write_tar(tmp_path / "0.tar", [("a.txt", b"a cat")])
    os.truncate(path, 1024)
    add(path, "a.jpg", MAX_IMAGE_BYTES + 1)
    end(path)
    with pytest.raises(DataError, match=r"sample a: the image has 134,217,729 bytes, more than"):
        read_raw_shards(tmp_path)
