"""Files and folders that are either whole or absent, and what is said where the disk refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from sd_perf.errors import UserError

ASIDE = ".writing_"
"""what the names of unfinished files and folders start with; only a killed process leaves any"""


@contextmanager
def disk_errors(path: Path, remedy: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """Turn what the operating system says of writing into one sentence: a full, read-only or
    missing disk."""
    try:
        yield
    except OSError as error:
        raise kind(
            f"{path} cannot be written ({error.strerror or one_line(error)}); {remedy}"
        ) from error


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A place beside `path`, of the same name, for a file or folder; it becomes `path` when the
    block ends well.

    It is flushed to the disk first. Where anything fails, `path` stays as it was and nothing is
    left beside it.
    """
    aside = TemporaryDirectory(
        prefix=f"{ASIDE}{path.name}.", dir=path.parent, ignore_cleanup_errors=True
    )
    with aside as folder:
        draft = Path(folder) / path.name
        yield draft
        for part in (draft, *draft.rglob("*")):
            _flush(part)
        draft.replace(path)
    _flush(path.parent)


def _flush(path: Path) -> None:
    """Make a file's content, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """`written_aside` of text in UTF-8."""
    with written_aside(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The file's value, None where there is no file; UserError where it cannot be read."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({one_line(error)}); restore it from a copy, or remove it"
        ) from error


def json_lines(objects: Iterable[dict[str, Any]]) -> str:
    """A JSON object per line."""
    return "".join(json.dumps(item) + "\n" for item in objects)


def one_line(error: BaseException) -> str:
    """An exception's text on one line, for a sentence around it."""
    return " ".join((str(error) or type(error).__name__).split())[:300]
