"""Digests of data files, in SHA256SUMS beside them, in the format of the program sha256sum."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from sd_perf.errors import DataError
from sd_perf.files import disk_errors, is_absent, opened_untrusted, untrusted_lines, written_aside

SUMS_NAME = "SHA256SUMS"
_LINE = re.compile(rb"([0-9a-f]{64}) [ *]([^\\/][^\\]*)")
"""digest and name; sha256sum writes names with a backslash or a line break otherwise"""
_RECORD = "record anew (`sd-perf data verify --record`)"
_REMEDY = f"restore it from a copy or {_RECORD}"


def record_digests(folder: Path, files: Iterable[Path]) -> None:
    """Write SHA256SUMS for files in or below a folder."""
    write_digests(folder, {file: digest(file) for file in files})


def write_digests(folder: Path, digests: dict[Path, str]) -> None:
    """Write SHA256SUMS of digests that are known, of files in or below a folder."""
    target = folder / SUMS_NAME
    lines = [f"{sha}  ".encode() + _name(folder, file) + b"\n" for file, sha in digests.items()]
    for line in lines:
        if not _LINE.fullmatch(line[:-1]):
            raise DataError(f"{target}: cannot hold the name {line[66:-1]!r}; rename the file")
    with disk_errors(target, "make room there", DataError), written_aside(target) as draft:
        draft.write_bytes(b"".join(lines))


def compare_digests(
    folder: Path, files: Iterable[Path], digests: dict[Path, str] | None = None
) -> Iterator[str]:
    """A sentence for each of these files that is not as SHA256SUMS says or is not named there.

    Files that are named there and are gone get one, too. `digests` are those that are known.

    Nothing where the folder has no SHA256SUMS; DataError where that cannot be read.
    """
    sums = folder / SUMS_NAME
    if is_absent(sums):
        return
    recorded = _read_digests(sums)
    for file in files:
        found = (digests or {}).get(file)
        if fault := _fault(file, recorded.pop(_name(folder, file), None), found):
            yield fault
    for file in (folder / os.fsdecode(name) for name in recorded):
        if is_absent(file):
            yield f"{file}: is missing, and {SUMS_NAME} names it; bring it back or {_RECORD}"


def _fault(file: Path, recorded: str | None, found: str | None) -> str:
    """What is wrong with a file whose SHA-256 should be this one; empty where it is.

    `found` is its SHA-256, where that is known.
    """
    if recorded is None:
        return f"{file}: is not in {SUMS_NAME}; move it away or {_RECORD}"
    try:
        same = (found or digest(file)) == recorded
    except DataError as error:
        return str(error)
    return "" if same else f"{file}: its bytes are not those recorded; bring it back or {_RECORD}"


def _read_digests(path: Path) -> dict[bytes, str]:
    digests = {}
    for number, line in enumerate(untrusted_lines(path, 2**14, remedy=_REMEDY, kind=DataError), 1):
        match = _LINE.fullmatch(line)
        if not line:
            continue
        if match is None:
            raise DataError(f"{path}: line {number} holds no SHA-256 and name of a file; {_REMEDY}")
        digests[match[2]] = match[1].decode()
    return digests


def _name(folder: Path, file: Path) -> bytes:
    return os.fsencode(file.relative_to(folder))


def digest(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with opened_untrusted(file, "mend or remove it", DataError) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
