"""The quick reader of plain tar files finds what tarfile finds, or leaves the file to it."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd_perf.data.tar_headers import _WINDOWS, read_plain_headers


def write(path: Path, sizes: list[int], format: int, mtime: float = 0, stem: str = "a") -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        folder = tarfile.TarInfo("")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for number, size in enumerate(sizes):
            info = tarfile.TarInfo(f"{stem}{number}.npy")
            info.size, info.mtime = size, mtime
            tar.addfile(info, io.BytesIO(bytes(range(256)) * (size // 256 + 1)))
    return path


def found(path: Path) -> list[tuple[bytes, int, int]] | None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        files = read_plain_headers(descriptor)
        return files and [
            (name, *place) for name, place in zip(files.names, files.places.tolist(), strict=True)
        ]
    finally:
        os.close(descriptor)


def by_tarfile(path: Path) -> list[tuple[bytes, int, int]]:
    with tarfile.open(path) as tar:
        return [(os.fsencode(m.name), m.offset_data, m.size) for m in tar if m.isreg()]


SIZES = [0, 1, 511, 512, 513, 700, 100_000, 3]


@pytest.mark.parametrize("mtime", [0, 1700000000.25])
@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_plain_files(tmp_path, format, mtime):
    """Times of files are an extended header each in the pax format, as webdataset writes them."""
    path = write(tmp_path / "0.tar", SIZES, format, mtime)
    assert found(path) == by_tarfile(path) != []


def test_more_headers_than_are_checked_at_once(tmp_path):
    for mtime in (0, 0.5):
        path = write(tmp_path / "0.tar", [0] * 7 * _WINDOWS, tarfile.PAX_FORMAT, mtime)
        assert len(found(path)) == 7 * _WINDOWS and found(path) == by_tarfile(path)


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_long_names_are_left_to_tarfile(tmp_path, format):
    assert found(write(tmp_path / "0.tar", SIZES, format, stem=f"{60 * 'd'}/{60 * 'e'}")) is None


def test_several_times_of_a_file(tmp_path):
    """As GNU tar writes them."""
    info = tarfile.TarInfo("a.npy")
    info.pax_headers = {"mtime": "1.5", "atime": "1700000000.123456789", "ctime": "2"}
    (tmp_path / "0.tar").write_bytes(info.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    assert found(tmp_path / "0.tar") == by_tarfile(tmp_path / "0.tar") != []


@pytest.mark.parametrize(
    "content", [b"13 mtime=1.25\n", b"15 mtime=1.25\n1", b"14 mtime=1.2-\n", b"14 mtime=1.25x", b""]
)
def test_records_that_are_not_right_are_left_to_tarfile(tmp_path, content):
    """A record says its length, and ends with it."""
    path = write(tmp_path / "0.tar", [3], tarfile.PAX_FORMAT, 1.25)
    data = bytearray(path.read_bytes())
    [begin] = [at for at in range(0, len(data), 512) if data[at:].startswith(b"14 mtime=1.25\n")]
    assert found(path) == by_tarfile(path) != []
    header = tarfile.TarInfo("./PaxHeaders/a0.npy")
    header.type, header.size = tarfile.XHDTYPE, len(content)
    data[begin - 512 : begin + 512] = header.tobuf(tarfile.USTAR_FORMAT) + content.ljust(512, b"\0")
    path.write_bytes(data)
    assert found(path) is None


@pytest.mark.parametrize("records", [{"path": "b.npy"}, {"size": "3"}, {"comment": "x"}])
def test_extended_headers_that_say_more_are_left_to_tarfile(tmp_path, records):
    info = tarfile.TarInfo("a.npy")
    info.pax_headers = {"mtime": "1.5", **records}
    (tmp_path / "0.tar").write_bytes(info.tobuf(tarfile.PAX_FORMAT) + bytes(2048))
    assert found(tmp_path / "0.tar") is None


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE, b"S", b"?"])
def test_other_kinds_are_left_to_tarfile(tmp_path, kind):
    info = tarfile.TarInfo("a.npy")
    info.type = kind
    (tmp_path / "0.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    assert found(tmp_path / "0.tar") is None


@given(st.data())
def test_damage_is_never_read_otherwise_than_by_tarfile(tmp_path_factory, data):
    """A byte of a header changed, the file cut or continued: left to tarfile, or found the same."""
    path = tmp_path_factory.getbasetemp() / "damaged.tar"
    content = bytearray(write(path, [3, 600], tarfile.PAX_FORMAT, 0.5).read_bytes())
    headers = range(0, 9 * 512, 512)
    place = data.draw(st.sampled_from(headers)) + data.draw(st.integers(0, 511))
    content[place] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))]
    path.write_bytes(content + data.draw(st.sampled_from([b"", bytes(700), b"x"])))
    files = found(path)
    assert files is None or files == by_tarfile(path)


def test_no_tar_file(tmp_path):
    for content in (b"", bytes(512), b"7" * 5000, bytes(3000) + b"x"):
        (tmp_path / "0.tar").write_bytes(content)
        assert found(tmp_path / "0.tar") is None
