"""Unfinished files and folders: each lies in a draft folder that its writer keeps locked."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

ASIDE = ".writing_"
"""prefix of the names of unfinished files and folders; only a killed process leaves any behind"""


@contextlib.contextmanager
def draft_folder(parent: Path, name: str = "") -> Iterator[Path]:
    """A folder in `parent` to write in, removed when the block ends; OSError where it cannot be.

    Removes the drafts that dead writers left in `parent`, too, once per process.
    """
    _remove_leftovers_once(Path(os.path.realpath(parent)))
    with contextlib.ExitStack() as stack:
        yield _locked(stack, parent, f"{ASIDE}{name}.")


def _locked(stack: contextlib.ExitStack, parent: Path, prefix: str) -> Path:
    """A new draft folder, locked until `stack` is closed."""
    while True:
        folder = stack.enter_context(
            TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True)
        )
        # Another process may take it for a leftover and remove it before it is locked.
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        stack.callback(os.close, descriptor)
        with contextlib.suppress(OSError):  # no flock here: then nobody removes leftovers, either
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if Path(folder).is_dir():
            return Path(folder)


def remove_leftovers(parent: Path) -> None:
    """Remove the draft folders in `parent` that nobody has locked: their writers are dead."""
    for folder in parent.glob(f"{ASIDE}*"):
        with contextlib.suppress(OSError):  # locked, gone, or not ours to remove
            _remove_unlocked(folder)


_remove_leftovers_once = functools.cache(remove_leftovers)


def _remove_unlocked(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    finally:
        os.close(descriptor)
