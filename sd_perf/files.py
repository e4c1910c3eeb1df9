"""Files and folders that are written whole or not at all, and the errors of writing them."""

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
"""prefix of the names of unfinished files and folders; only a killed process leaves any behind"""


@contextmanager
def disk_errors(path: Path, remedy: str, kind: type[UserError] = UserError) -> Iterator[None]:
    """Turn an OSError of the block into one of `kind`: one sentence with path, cause and remedy.

    For blocks that write `path`: the disk may be full, read-only or missing.
    """
    try:
        yield
    except OSError as error:
        raise kind(
            f"{path} cannot be written ({error.strerror or one_line(error)}); {remedy}"
        ) from error


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Write a file or folder in full before it takes the name `path`.

    Gives a path in a temporary folder beside `path`, with the same file name, for the block to
    write to. When the block ends, what it wrote is flushed to the disk and moved to `path`. Where
    anything fails, `path` stays as it was and nothing is left beside it.
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
    """Make a file's content, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8, whole or not at all."""
    with written_aside(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """The value in a JSON file; None where there is no file, UserError where it cannot be read."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({one_line(error)}); restore it from a copy, or remove it"
        ) from error


def json_lines(objects: Iterable[dict[str, Any]]) -> str:
    """The objects as text, one JSON object per line."""
    return "".join(json.dumps(item) + "\n" for item in objects)


def one_line(error: BaseException) -> str:
    """An exception's text on one line of at most 300 characters, to be quoted in a sentence."""
    return " ".join((str(error) or type(error).__name__).split())[:300]
