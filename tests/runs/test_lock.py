"""The lock of a run folder: one holder, named; free when the holder ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from sd_perf.errors import UserError
from sd_perf.runs.folder import open_run
from sd_perf.runs.lock import LOCK_NAME, RunLock


def test_one_holder_who_is_named(tmp_path):
    named = rf"{tmp_path}: is in use by {platform.node()}, process {os.getpid()}, since 2\d\d\d-"
    with RunLock() as first, RunLock() as second:
        first.take(tmp_path)
        first.take(tmp_path)  # held already
        before = (tmp_path / LOCK_NAME).read_bytes()
        with pytest.raises(UserError, match=rf"{named}.*; wait for it or stop it"):
            second.take(tmp_path)
        assert (tmp_path / LOCK_NAME).read_bytes() == before
        first.release()
        second.take(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_free_after_kill_nine(tmp_path):
    code = f"""
from pathlib import Path
from sd_perf.runs.lock import RunLock
RunLock().take(Path({str(tmp_path)!r}))
print("held", flush=True)
input()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with RunLock() as lock:
        with pytest.raises(UserError, match=f"process {process.pid}"):
            lock.take(tmp_path)
        process.kill()
        process.communicate()
        lock.take(tmp_path)
        assert f"process {os.getpid()}," in (tmp_path / LOCK_NAME).read_text()


def test_it_follows_a_folder_that_is_moved(tmp_path):
    (tmp_path / "run").mkdir()
    with RunLock() as lock:
        lock.take(tmp_path / "run")
        (tmp_path / "run").rename(tmp_path / "run.1")
        with pytest.raises(UserError, match=r"run\.1: is in use by"):
            RunLock().take(tmp_path / "run.1")
        (tmp_path / "run").mkdir()
        lock.take(tmp_path / "run")
        assert list((tmp_path / "run.1").iterdir()) == []
    assert list((tmp_path / "run").iterdir()) == []


def test_a_file_removed_by_its_last_holder_is_not_locked(tmp_path, monkeypatch):
    """The second opens the file, the first lets go of it and removes it, then the second locks."""
    first, second, third = RunLock(), RunLock(), RunLock()
    first.take(tmp_path)
    flock = fcntl.flock

    def late(*arguments: int) -> None:
        monkeypatch.undo()
        first.release()
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)
    second.take(tmp_path)
    with pytest.raises(UserError, match="is in use by"):
        third.take(tmp_path)
    second.release()


@pytest.mark.parametrize("content", [b"", b"\x1b[31mred\n\xff" + b"x" * 1000])
def test_whatever_the_file_says_is_one_line(content, tmp_path):
    with RunLock() as lock:
        lock.take(tmp_path)
        (tmp_path / LOCK_NAME).write_bytes(content)
        with pytest.raises(UserError) as told:
            RunLock().take(tmp_path)
    assert str(told.value).isprintable() and len(str(told.value)) < 600


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_NAME).symlink_to(tmp_path / "outside")
    with pytest.raises(UserError, match="cannot be locked"):
        RunLock().take(tmp_path / "run")
    assert not (tmp_path / "outside").exists()


def test_a_start_that_comes_second_is_refused_before_it_writes(make_config):
    """Both saw an empty folder; the first has claimed it since."""
    config = make_config()
    with RunLock() as first, RunLock() as second:
        open_run(config, resume=False, lock=first)
        folder = Path(config.run.dir)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(UserError, match="is in use by"):
            open_run(config, resume=True, lock=second)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
