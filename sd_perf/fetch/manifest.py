"""What can be fetched, from where and under which terms: `sources.yaml`, read."""

from __future__ import annotations

import datetime
import difflib
import functools
import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from sd_perf.errors import UserError
from sd_perf.files import is_storable
from sd_perf.visible import visible

SOURCES = Path(__file__).with_name("sources.yaml")
ALGORITHMS = ("sha512", "sha256", "sha1", "md5")
"""of published digests, the strongest first"""
_COUNT = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LISTED = re.compile(r"([0-9a-fA-F]{32,128})[ \t]+\*?(?:\./)*(.+)")


@dataclass(frozen=True)
class File:
    """A file of an artefact, and what is published about it."""

    name: str
    """path in the output folder, with slashes"""
    size: int | None = None
    """bytes, where published"""
    digests: dict[str, str] = field(default_factory=dict)
    """published digests in hexadecimal, by algorithm"""
    starts: bytes = b""
    """what the file begins with; checked where no digest is published"""
    path: str = ""
    """where it lies below a source's folder, if not under its name"""


@dataclass(frozen=True)
class Source:
    """A place on the internet that has, or had, an artefact."""

    url: str
    seen: datetime.date | None = None
    """last day on which it is known to have lived"""
    gone: datetime.date | None = None
    """first day on which it is known to have been gone"""


@dataclass(frozen=True)
class Artefact:
    """A data set or a network that the benchmark needs."""

    name: str
    holds: str
    terms: str
    """licence, and what whoever fetches it accepts"""
    files: tuple[File, ...]
    sources: tuple[Source, ...]
    otherwise: str
    """what to do when no source answers"""
    about: int | None = None
    """bytes in all, where sizes of single files are not published"""
    sums: str = ""
    """list of digests that lies beside the files"""
    unpack: bool = False
    """whether the files are zip archives to unpack"""

    @property
    def size(self) -> int | None:
        """Bytes in all, where known, if only about."""
        sizes = [file.size for file in self.files]
        return self.about if None in sizes else sum(size or 0 for size in sizes)

    def advice(self, named: bool) -> str:
        """What to do when no source gives what is wanted, with the dates that are known.

        `named`: whether the user named the source.
        """
        if named:
            return "Check what --from names, or fetch without it"
        gone = (source for source in self.sources if source.gone)
        dates = "".join(f"{source.url} has been gone since {source.gone}. " for source in gone)
        return f"{dates}What to do: {self.otherwise}"


def artefacts() -> dict[str, Artefact]:
    """Every artefact of `sources.yaml` by its name."""
    return _read(SOURCES)


@functools.cache
def _read(path: Path) -> dict[str, Artefact]:
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {name: _artefact(name, entry) for name, entry in tree.items()}


def artefact_named(name: str) -> Artefact:
    """The artefact of this name; UserError, with those that there are, where there is none."""
    known = artefacts()
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
        raise UserError(f"{visible(name)[:100]}: nothing of this name can be fetched; {hint}")
    return known[name]


def _artefact(name: str, entry: dict[str, Any]) -> Artefact:
    files = (file for item in entry.pop("files") for file in _files(dict(item)))
    sources = (Source(**item) for item in entry.pop("sources"))
    return Artefact(name=name, files=tuple(files), sources=tuple(sources), **entry)


def _files(item: dict[str, Any]) -> list[File]:
    """The files that an entry stands for: one, or as many as {00000..00831} counts."""
    digests = {key: item.pop(key) for key in ALGORITHMS if key in item}
    starts = item.pop("starts", "").encode()
    count = _COUNT.search(item["name"])
    if count is None:
        return [File(**item, digests=digests, starts=starts)]
    first, last = count.groups()
    names = (
        _COUNT.sub(f"{number:0{len(first)}}", item["name"])
        for number in range(int(first), int(last) + 1)
    )
    return [File(name, starts=starts) for name in names]


def digests_listed(text: str, where: str) -> dict[str, dict[str, str]]:
    """Digests by algorithm of each file that a list names: lines `DIGEST  [./]PATH`.

    Which algorithm it is follows from the length. UserError, with `where` and the line, for any
    other line, and for a path that leaves the folder or that no disk can hold.
    """
    lengths = {hashlib.new(name).digest_size * 2: name for name in ALGORITHMS}
    found: dict[str, dict[str, str]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        match = _LISTED.fullmatch(line.rstrip())
        algorithm = lengths.get(len(match[1])) if match else None
        if match is None or algorithm is None:
            raise UserError(f"{where}: line {number} is no digest and path of a file")
        require_inside(match[2], f"{where}: line {number}")
        found.setdefault(match[2], {})[algorithm] = match[1].lower()
    return found


def require_inside(name: str, where: str) -> None:
    """UserError unless a path, as others wrote it, is one of a file below the folder."""
    path = PurePosixPath(name)
    fits = (
        not path.is_absolute()
        and ".." not in path.parts
        and str(path) == name
        and path.parts
        and not path.parts[0].startswith(".")
        and visible(name) == name
        and "\\" not in name
        and is_storable(name + ".part")
    )
    if not fits:
        raise UserError(f"{where} names {visible(name)[:100]!r}, which is no file of the folder")
