"""Writing shards: the layout, all or nothing, equal bytes."""

from __future__ import annotations

import errno
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest

from sd_perf.data.shard_writer import ShardWriter
from sd_perf.errors import DataError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_written_layout(make_shards):
    folder = Path(make_shards(num=6).path)
    assert names(folder) == ["00000.tar", "00001.tar", "SHA256SUMS"]
    with tarfile.open(folder / "00001.tar") as tar:
        members = tar.getmembers()
        arrays = np.load(io.BytesIO(tar.extractfile("000010001.npy").read()), allow_pickle=False)
        metadata = json.load(tar.extractfile("000010001.json"))
    assert members[0].isdir() and members[0].name == ""
    files = [member.name for member in members[1:]]
    assert files == sorted(files) and len(files) == 8
    assert files[:4] == [
        "000010000.context.npy",
        "000010000.json",
        "000010000.npy",
        "000010000.txt",
    ]
    assert arrays.shape == (1, 8, 2, 2) and arrays.dtype == np.float32 and (arrays == 5).all()
    assert metadata == {"number": 5}


def test_writer_refuses_to_overwrite(make_shards):
    folder = Path(make_shards().path)
    before = (folder / "00000.tar").read_bytes()
    with pytest.raises(DataError, match="exists already"):
        ShardWriter(folder)
    assert (folder / "00000.tar").read_bytes() == before


def test_writer_leaves_all_or_nothing(tmp_path):
    with pytest.raises(KeyError), ShardWriter(tmp_path, samples_per_shard=1) as writer:
        for _ in range(3):
            writer.write(np.zeros((8, 2, 2)), "caption")
        raise KeyError
    assert names(tmp_path) == []


def test_full_disk(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(DataError, match="No space left"), ShardWriter(tmp_path) as writer:
        writer.write(np.zeros((8, 2, 2)), "caption")
        monkeypatch.setattr(tarfile.TarFile, "addfile", full)
        writer.write(np.zeros((8, 2, 2)), "caption")
    assert names(tmp_path) == []


def test_equal_samples_give_equal_bytes(make_shards):
    first, second = (Path(make_shards(name=name).path) for name in "ab")
    assert (first / "00002.tar").read_bytes() == (second / "00002.tar").read_bytes()
