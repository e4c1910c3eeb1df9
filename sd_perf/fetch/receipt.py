"""What a folder got, from where and when: `.sd_perf_fetch.json`."""

from __future__ import annotations

import datetime
import hashlib
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from sd_perf.errors import UserError
from sd_perf.fetch.manifest import ALGORITHMS, File
from sd_perf.files import disk_errors, opened_untrusted, read_json, require_shape, write_json

RECEIPT = ".sd_perf_fetch.json"
_ENTRY = {
    "artefact": str,
    "url": (str, None),
    "size": int,
    "modified_ns": int,
    "sha256": str,
    "published": dict,
    "time": str,
}
_BLOCK = 2**20


class Receipt:
    """The receipt of a folder, read once and written after every file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        tree = read_json(folder / RECEIPT)
        if tree is not None:
            require_shape(tree, {"files": {}}, f"{folder / RECEIPT}: is no receipt of a fetch")
        self._files: dict[str, dict[str, Any]] = tree["files"] if tree else {}
        for name, entry in self._files.items():
            require_shape(entry, _ENTRY, f"{folder / RECEIPT}: says of {name!r} what it cannot")

    def vouches_for(self, file: File) -> bool:
        """Whether a file was verified and has not been written to since."""
        entry = self._files.get(file.name)
        try:
            found = (self.folder / file.name).stat()
        except OSError:
            return False
        return (
            entry is not None
            and (found.st_size, found.st_mtime_ns) == (entry["size"], entry["modified_ns"])
            and file.size in (None, entry["size"])
            and all(entry["published"].get(k, v) == v for k, v in file.digests.items())
        )

    def add(self, artefact: str, file: File, url: str | None, sha256: str) -> None:
        """Record a verified file; `url` None for one that was there."""
        found = (self.folder / file.name).stat()
        entry = {
            "artefact": artefact,
            "url": url and urlsplit(url)._replace(query="").geturl(),  # without a signature
            "size": found.st_size,
            "modified_ns": found.st_mtime_ns,
            "sha256": sha256,
            "published": file.digests,
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        with self._lock:
            self._files[file.name] = entry
            self._write()

    def forget(self, name: str) -> None:
        """Take a file out, so that the next fetch looks at its bytes."""
        with self._lock:
            if self._files.pop(name, None) is not None:
                self._write()

    def recorded(self, artefact: str) -> list[File]:
        """The files of an artefact that were fetched, each with the digests that it had."""
        return [
            File(name, entry["size"], _known(entry))
            for name, entry in self._files.items()
            if entry["artefact"] == artefact
        ]

    def _write(self) -> None:
        path = self.folder / RECEIPT
        with disk_errors(path, "make room there"):
            write_json(path, {"files": dict(sorted(self._files.items()))})


def _known(entry: dict[str, Any]) -> dict[str, str]:
    """The digests of a file that was fetched, by algorithms that can be computed."""
    published = {name: entry["published"].get(name) for name in ALGORITHMS}
    return {name: digest for name, digest in published.items() if digest} | {
        "sha256": entry["sha256"]
    }


def fault_of(path: Path, file: File, halt: Callable[[], object] = lambda: None) -> tuple[str, str]:
    """What is wrong with the bytes at a path, in words, or empty; and their SHA-256.

    `halt` is called after every megabyte, and may raise.
    """
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return f"it has {size:,} bytes, and not {file.size:,}", ""
    found = _digests(path, {"sha256", *file.digests}, halt)
    for algorithm, digest in file.digests.items():
        if found[algorithm] != digest:
            return f"its {algorithm.upper()} is not the published one", found["sha256"]
    if not file.digests and not _starts(path, file.starts):
        return f"it does not begin with {file.starts.decode()!r}", found["sha256"]
    return "", found["sha256"]


def _starts(path: Path, start: bytes) -> bool:
    with opened_untrusted(path) as stream:
        return stream.read(len(start)) == start


def _digests(path: Path, algorithms: Iterable[str], halt: Callable[[], object]) -> dict[str, str]:
    """Digests of a file in hexadecimal by algorithm, in one pass."""
    hashes = {name: hashlib.new(name, usedforsecurity=False) for name in algorithms}
    with opened_untrusted(path, "mend or remove it", UserError) as stream:
        while block := stream.read(_BLOCK):
            halt()
            for digest in hashes.values():
                digest.update(block)
    return {name: digest.hexdigest() for name, digest in hashes.items()}
