"""One writer per run folder: locks that training and evaluation hold for as long as they live."""

from __future__ import annotations

import datetime
import fcntl
import os
import platform
from pathlib import Path
from types import TracebackType

from sd_perf.errors import UserError
from sd_perf.files import one_line, opened_untrusted

LOCK_NAME = ".lock"
EVALUATION_LOCK_NAME = ".evaluation.lock"
"""of evaluation alone, which may go on beside training"""


class RunLock:
    """The right to write in a run folder, held from `take` to the end of the `with` block.

    It is an flock on the file `.lock`, so it ends with the process, however that dies. The file
    names its holder; commands that only read take no lock.
    """

    def __init__(self, name: str = LOCK_NAME) -> None:
        self._name = name
        self._folder: int | None = None
        self._file: int | None = None

    def __enter__(self) -> RunLock:
        return self

    def is_free(self, folder: Path) -> bool:
        """Whether no process holds this lock of a folder at the moment."""
        probe = RunLock(self._name)
        try:
            probe._take(folder)
        except BlockingIOError:
            return False
        probe.release()
        return True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()

    def take(self, folder: Path) -> None:
        """Lock an existing folder, and release the one held before; UserError where it is taken.

        Without effect where this lock holds the folder already.
        """
        try:
            self._take(folder)
        except BlockingIOError as error:
            who = holder(folder, self._name) or "another process"
            raise UserError(
                f"{folder}: is in use by {who}; wait for it or "
                "stop it, or choose another run folder"
            ) from error
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be locked ({error.strerror or one_line(error)}); choose a run "
                "folder that can be written, on a file system that has flock"
            ) from error

    def release(self) -> None:
        """Give the folder free; without effect where none is held."""
        if self._folder is None or self._file is None:
            return
        # Removed while it is locked, from where the folder is now: --fresh may have moved it.
        if _is_same(self._file, self._folder, self._name):
            os.unlink(self._name, dir_fd=self._folder)
        for descriptor in (self._file, self._folder):
            os.close(descriptor)
        self._folder = self._file = None

    def _take(self, folder: Path) -> None:
        directory = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        if self._file is not None and _is_same(self._file, directory, self._name):
            os.close(directory)
            return
        try:
            file = _lock_in(directory, self._name)
        except BaseException:
            os.close(directory)
            raise
        self.release()
        self._folder, self._file = directory, file
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        os.truncate(file, 0)
        os.write(file, f"{platform.node()}, process {os.getpid()}, since {now}\n".encode())


def _lock_in(directory: int, name: str) -> int:
    """A descriptor of the locked file in a directory; BlockingIOError where another has it."""
    while True:
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644, dir_fd=directory)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(file)
            raise
        # Its last holder may have removed the file between the two calls: then lock the new one.
        if _is_same(file, directory, name):
            return file
        os.close(file)


def _is_same(file: int, directory: int, name: str) -> bool:
    """Whether an open file is the one that a directory now has under the lock's name."""
    try:
        named = os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(named, os.fstat(file))


def holder(folder: Path, name: str = LOCK_NAME) -> str | None:
    """Host, process and time that a folder's lock names; None where there is no lock.

    A killed process leaves its lock's file behind. At most 200 characters that can be printed.
    """
    path = folder / name
    try:
        with opened_untrusted(path) as file:
            text = file.read(200).decode(errors="replace").strip()
    except UserError:
        return None
    return "".join(c if c.isprintable() else "?" for c in text) or None
