"""A file of JSON lines that grows while it is read: each look reads what is new."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from sd_perf.files import MAX_LINE_BYTES, is_absent, opened_untrusted, parse_json
from sd_perf.runs.scores import is_number


class FollowedLines:
    """The objects of a file such as metrics.jsonl, with numbers for all of `keys`."""

    def __init__(self, path: Path, keys: tuple[str, ...]) -> None:
        self.objects: list[dict[str, Any]] = []
        self.damaged = 0
        """lines that are left out"""
        self.written_at: float | None = None
        """Unix time at which the file was last written to"""
        self._path, self._keys = path, keys
        self._inode, self._offset = 0, 0

    def read(self) -> None:
        """Take the lines that were added; all anew where the file is another (a resumed run's).

        A last line that is not complete yet is left for the next look. UserError where the file
        cannot be read.
        """
        if is_absent(self._path):
            self._begin(inode=0)
            return
        with opened_untrusted(self._path) as file:
            status = os.fstat(file.fileno())
            if status.st_ino != self._inode or status.st_size < self._offset:
                self._begin(status.st_ino)
            self.written_at = status.st_mtime
            file.seek(self._offset)
            while (line := file.readline(MAX_LINE_BYTES)).endswith(b"\n"):
                self._offset += len(line)
                self._take(line)
            if len(line) == MAX_LINE_BYTES:
                raise OSError(f"a line has {MAX_LINE_BYTES:,} bytes or more")

    def _begin(self, inode: int) -> None:
        self.objects, self.damaged, self.written_at = [], 0, None
        self._inode, self._offset = inode, 0

    def _take(self, line: bytes) -> None:
        try:
            value = parse_json(line)
        except ValueError:
            value = None
        if isinstance(value, dict) and all(is_number(key, value.get(key)) for key in self._keys):
            self.objects.append(value)
        else:
            self.damaged += 1
