"""Files that are whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from sd_perf.errors import UserError
from sd_perf.files import disk_errors, write_text, written_aside


def test_a_file_takes_the_place_of_another_when_it_is_whole(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with written_aside(path) as draft:
        assert draft.name == "a.txt"  # libraries read the format from it
        draft.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_folder(tmp_path):
    with written_aside(tmp_path / "unet") as draft:
        (draft / "deep").mkdir(parents=True)
        (draft / "deep" / ".hidden").write_text("x")
        assert not (tmp_path / "unet").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["unet"]
    assert (tmp_path / "unet" / "deep" / ".hidden").read_text() == "x"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_what_fails_leaves_the_old_one(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), written_aside(path) as draft:
        draft.write_text("half")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_full_disk(mount_tmpfs):
    disk = mount_tmpfs("size=64k")
    write_text(disk / "a.txt", "old")
    with (
        pytest.raises(UserError, match="No space left on device"),
        disk_errors(disk / "a.txt", "make room"),
    ):
        write_text(disk / "a.txt", 100_000 * "new")
    assert (disk / "a.txt").read_text() == "old" and [path.name for path in disk.iterdir()] == [
        "a.txt"
    ]


def test_two_writers_do_not_meet(tmp_path):
    path: Path = tmp_path / "a.txt"
    with written_aside(path) as first:
        first.write_text("first")
        write_text(path, "second")
    assert path.read_text() == "first"
