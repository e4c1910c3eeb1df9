"""Zip files that are small on the disk and large in memory are refused before torch has them."""

from __future__ import annotations

import tracemalloc
import zipfile
from pathlib import Path

import pytest
import torch

from sd_perf.errors import CheckpointError
from sd_perf.models.open_clip_library import read_open_clip_weights
from sd_perf.models.weight_files import read_ldm_checkpoint
from sd_perf.torch_files import require_bounded

READERS = {
    "ldm": read_ldm_checkpoint,
    "open_clip": lambda path: read_open_clip_weights(path, "text_encoder.weights"),
}
LITTLE = 4 * 2**20
"""bytes of memory that refusing a file may take"""


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.save({"a": torch.zeros(2**18)}, tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def rewrite(path: Path, compression: int, **changes: bytes) -> None:
    """The zip file anew; members whose names end so get other contents."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            ending = name.rpartition("/")[2].removesuffix(".pkl")
            archive.writestr(name, changes.get(ending, content))


def bomb(path: Path) -> None:
    """A 64 KB file of 64 MiB."""
    rewrite(path, zipfile.ZIP_DEFLATED, **{"0": bytes(2**26)})
    assert path.stat().st_size < 2**17


def overlap(path: Path) -> None:
    """A hundred members that are the same bytes."""
    with zipfile.ZipFile(path, "a") as archive:
        [largest] = (info for info in archive.infolist() if info.file_size == 2**20)
        archive.filelist += [largest] * 100
        archive._didModify = True


def large_pickle(path: Path) -> None:
    rewrite(path, zipfile.ZIP_STORED, data=b"\x80\x02]" + b"]" * (9 * 2**20) + b".")


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (bomb, "it is compressed"),
        (overlap, "its parts would take more bytes than it has"),
        (large_pickle, "its names and shapes take more than 8,388,608 bytes"),
    ],
)
def test_memory_follows_the_size_on_the_disk(spoil, reason, read, saved):
    assert torch.equal(read(saved)["a"], torch.zeros(2**18))
    spoil(saved)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=reason):
        read(saved)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < LITTLE


def test_files_of_old_versions_pass(tmp_path):
    torch.save({"a": torch.ones(3)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with (tmp_path / "old.pt").open("rb") as file:
        require_bounded(file)
    state = read_open_clip_weights(tmp_path / "old.pt", "text_encoder.weights")
    assert torch.equal(state["a"], torch.ones(3))
