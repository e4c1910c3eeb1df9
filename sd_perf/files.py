"""Small files that are either whole or absent, and what is said where the disk refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sd_perf.errors import UserError


@contextmanager
def disk_errors(path: Path, remedy: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """Turn what the operating system says of writing into one sentence: a full, read-only or missing disk."""
    try:
        yield
    except OSError as error:
        raise kind(f"{path} cannot be written ({error.strerror or one_line(error)}); {remedy}") from error


def write_text(path: Path, text: str) -> None:
    """Write aside, flush to the disk, rename over `path`; where that fails, `path` stays as it was."""
    aside = path.with_name(f".writing_{path.name}")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def one_line(error: BaseException) -> str:
    """An exception's text on one line, for a sentence around it."""
    return " ".join((str(error) or type(error).__name__).split())[:300]
