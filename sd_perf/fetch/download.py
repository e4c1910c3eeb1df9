"""One file from one place to a draft: resumed where it can be, and never mixed from two files."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd_perf.errors import UserError
from sd_perf.fetch.manifest import File
from sd_perf.fetch.web import CHUNK, Refused, Transient, Web
from sd_perf.files import is_absent, misfit, read_json, write_json

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse

DRAFTS = ".sd_perf_fetch"
"""folder of unfinished files in the output folder; it stays when a fetch is stopped"""
Progress = Callable[[int, int | None], None]
"""called with the bytes of a file that are there, and those of it in all"""
_SPAN = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_NOTE = {"url": str, "etag": str, "modified": str, "size": int}


class Draft:
    """An unfinished file, and a note of where its bytes came from."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.path = folder / DRAFTS / f"{name}.part"
        self._note_path = self.path.with_name(self.path.name + ".json")

    @property
    def size(self) -> int:
        """Bytes that are there."""
        return 0 if is_absent(self.path) else self.path.stat().st_size

    def note(self) -> dict[str, Any]:
        """URL, ETag, Last-Modified and size of what the draft is a part of; empty if unknown."""
        try:
            note = read_json(self._note_path)
        except UserError:
            return {}  # without it the file is begun anew
        return note if note is not None and not misfit(note, _NOTE) else {}

    def begin(self, url: str, response: BaseHTTPResponse, size: int) -> None:
        """Empty the draft, for the bytes of this answer."""
        self.discard()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        headers = response.headers
        etag, modified = headers.get("ETag", ""), headers.get("Last-Modified", "")
        note = {"url": url, "etag": etag, "modified": modified, "size": size}
        write_json(self._note_path, note)
        self.path.touch()

    def discard(self) -> None:
        """Remove it."""
        self.path.unlink(missing_ok=True)
        self._note_path.unlink(missing_ok=True)

    def take(self, target: Path) -> None:
        """Give the finished file its name."""
        target.parent.mkdir(parents=True, exist_ok=True)
        self.path.replace(target)
        self.discard()


def download(web: Web, url: str, file: File, draft: Draft, progress: Progress) -> None:
    """Fill a draft with all bytes of a file, in as many attempts as bring something new.

    Digests are not looked at. Raises Refused where the URL does not give the file, UserError where
    the disk has too little room, and OSError where it cannot be written.
    """
    furthest, failures = draft.size, 0
    while True:
        try:
            _attempt(web, url, file, draft, progress)
            return
        except Transient as fault:
            # Bytes that came again, after the draft was begun anew, are nothing new.
            brought = draft.size - furthest
            furthest = max(furthest, draft.size)
            failures = 0 if brought >= web.patience.progress else failures + 1
            web.wait_after(fault, url, failures)


def copy(web: Web, path: Path, file: File, draft: Draft, progress: Progress) -> None:
    """Fill a draft with the bytes of a file on this machine; errors as `download`."""
    if path.exists() and not path.is_file():
        raise Refused("it is no regular file")
    try:
        source = path.open("rb")
        size = os.fstat(source.fileno()).st_size
    except OSError as error:
        raise Refused(f"it cannot be read ({error.strerror})") from error
    with source:
        _require_size(file, size)
        require_room(draft.folder, size)
        draft.discard()
        draft.path.parent.mkdir(parents=True, exist_ok=True)
        with draft.path.open("wb", buffering=0) as target:
            while chunk := _read(source):
                web.rest(0)
                _write(target, chunk)
                progress(target.tell(), size)


def _read(source: Any) -> bytes:
    try:
        return source.read(4 * CHUNK)
    except OSError as error:
        raise Refused(f"it cannot be read ({error.strerror})") from error


def require_room(folder: Path, size: int) -> None:
    """UserError where the disk of a folder has less than `size` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            f"{folder}: {size:,} bytes are needed and {free:,} are free; make room, or choose "
            "another --output-dir"
        )


def _attempt(web: Web, url: str, file: File, draft: Draft, progress: Progress) -> None:
    """One request for what a draft lacks; Transient where it still lacks something."""
    note = draft.note()
    same_url = note.get("url") == url
    size = file.size if file.size is not None else note.get("size") if same_url else None
    if size is not None and draft.size == size:
        return  # it was killed before it was looked at
    asked = _resume_headers(note, same_url, file, draft.size, size)
    with web.get(url, asked) as response:
        total = _begin(url, response, file, draft, note if same_url else {}, bool(asked))
        have = draft.size
        require_room(draft.folder, total - have)
        progress(have, total)
        with draft.path.open("ab", buffering=0) as target:
            for chunk in web.chunks(response, total - have + 1):
                _write(target, chunk)
                have += len(chunk)
                progress(min(have, total), total)
    if have > total:
        draft.discard()
        raise Transient(f"it sends more than the {total:,} bytes that it promised")
    if have < total:
        raise Transient(f"it ended after {have:,} of {total:,} bytes")


def _resume_headers(
    note: dict[str, Any], same_url: bool, file: File, have: int, size: int | None
) -> dict[str, str]:
    """The headers that ask for the rest of a draft; none where it must be begun anew.

    The server is asked to answer with the whole file if it has changed. Bytes of another place can
    be gone on with where a digest tells in the end whether they belong together.
    """
    if not note or not 0 < have < (size or float("inf")):
        return {}
    span = {"Range": f"bytes={have}-"}
    strong = note["etag"] if not note["etag"].startswith("W/") else ""
    if same_url and (validator := strong or note["modified"]):
        return span | {"If-Range": validator}
    return span if file.digests else {}


def _begin(
    url: str,
    response: BaseHTTPResponse,
    file: File,
    draft: Draft,
    note: dict[str, Any],
    asked: bool,
) -> int:
    """Make a draft ready for the bytes of an answer; returns the size of the whole file."""
    if response.status == 200:
        total = _content_length(response, file)
        _require_size(file, total)
        draft.begin(url, response, total)
        return total
    have = draft.size
    span = _SPAN.fullmatch(response.headers.get("Content-Range", ""))
    if response.status == 416 or not asked or span is None:
        draft.discard()
        raise Transient(f"it answers {response.status} to a request for what is left")
    first, total = int(span[1]), int(span[3]) if span[3] != "*" else -1
    if first != have:
        draft.discard()
        raise Transient(f"asked for bytes from {have:,} on, it sends those from {first:,} on")
    changed = total != note.get("size", total) or note.get("etag", "") not in (
        "",
        response.headers.get("ETag", ""),
    )
    if changed or total < have:
        draft.discard()
        raise Transient("the file has changed there meanwhile")
    _require_size(file, total)
    return total


def _content_length(response: BaseHTTPResponse, file: File) -> int:
    """The size of the file that an answer has, or else the published one."""
    value = response.headers.get("Content-Length", "")
    if re.fullmatch(r"\d{1,18}", value):
        return int(value)
    if file.size is None:
        raise Refused("it does not say how long the file is")
    return file.size


def _require_size(file: File, size: int) -> None:
    if file.size is not None and size != file.size:
        raise Refused(f"its file has {size:,} bytes, and not {file.size:,}")


def _write(target: Any, chunk: bytes) -> None:
    """Write all of a chunk, without a buffer, so that a full disk is told here."""
    view = memoryview(chunk)
    while view:
        view = view[target.write(view) :]
