"""Where the files of a plain tar file lie, read from its headers alone.

Python's tarfile knows every kind of tar file and takes some 30 microseconds a header. The shards of
the benchmark have twenty to forty million headers, nearly all of one plain kind, which is read
here. What is not plain is left to tarfile, which also says what is wrong with it.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_BLOCK = 512
_WINDOW = 6 * _BLOCK
"""bytes read at a time: the headers of small files that follow each other come together"""
_CHUNK = 1024
"""headers that are checked at a time; bounds the memory"""
_SIZE, _SUM, _TYPE, _MAGIC, _PREFIX = 124, 148, 156, 257, 345
"""bytes of a header at which its fields begin"""
_EMPTY, _EXTENDED = bytes(_BLOCK), ord("x")
_EIGHTS = 8 ** np.arange(10, -1, -1)
_TIME = re.compile(rb"([0-9]+) [amc]time=[0-9.]+\n")
"""record of an extended header that says nothing of the file but a time"""


class Files(NamedTuple):
    """Regular files of a tar file, in its order."""

    names: list[bytes]
    places: np.ndarray
    """(files, 2) int64: offset of the content in the tar file, and size, bytes"""


def read_plain_headers(descriptor: int) -> Files | None:
    """The regular files of an open tar file.

    None where it is not plain, not whole, or no tar file. Plain: headers with right checksums, of
    regular files and folders whose names have at most 100 bytes, each perhaps behind an extended
    header that holds times; zeros behind the end.
    """
    found = []
    for headers, offsets, end in _walk(descriptor):
        some = _plain_files(headers, offsets)
        if some is None:
            return None
        found.append(some)
        if end is not None:
            names = [name for files in found for name in files.names]
            all_of_them = Files(names, np.concatenate([files.places for files in found]))
            return all_of_them if _is_zero_from(descriptor, end) else None
    return None


def _walk(descriptor: int) -> Iterator[tuple[list[bytes], list[int], int | None]]:
    """Headers and the offsets behind them, by chunks; with the last one the end of the archive.

    Ends early at what cannot be followed. Offsets only grow. An extended header and what it extends
    are of one chunk.
    """
    headers: list[bytes] = []
    offsets: list[int] = []
    start, length = 0, _WINDOW
    while window := os.pread(descriptor, length, start):
        at = 0
        while len(header := window[at : at + _BLOCK]) == _BLOCK:
            try:
                size, room = _content(header[_SIZE : _SIZE + 11])
            except ValueError:
                if header == _EMPTY:
                    yield headers, offsets, start + at
                return
            at += _BLOCK
            headers.append(header)
            offsets.append(start + at)
            if header[_TYPE] == _EXTENDED:
                length = 2 * _WINDOW  # each file has two headers
                content = window[at : at + size]
                if len(content) < size:
                    content = os.pread(descriptor, min(size, _WINDOW), start + at)
                if not _holds_times(content):
                    return
            at += room
        if at == 0:  # the file has ended within a header
            return
        start += at
        if len(headers) >= _CHUNK and headers[-1][_TYPE] != _EXTENDED:
            yield headers, offsets, None
            headers, offsets = [], []


@functools.lru_cache(maxsize=4096)
def _content(digits: bytes) -> tuple[int, int]:
    """The size that octal digits say, and the bytes that so much takes in the file."""
    size = int(digits, 8)
    if size < 0:
        raise ValueError(digits)
    return size, (size + _BLOCK - 1) // _BLOCK * _BLOCK


def _holds_times(content: bytes) -> bool:
    """Whether the content of an extended header is records of times, each as long as it says."""
    end = 0
    while end < len(content):
        match = _TIME.match(content, end)
        if match is None or int(match[1]) != match.end() - end:
            return False
        end = match.end()
    return end > 0


def _plain_files(headers: list[bytes], offsets: list[int]) -> Files | None:
    """The regular files of headers and offsets behind them; None where a header is not plain."""
    fields = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, _BLOCK)
    digits = fields[:, _SIZE : _SIZE + 11] - ord("0")
    check_digits = fields[:, _SUM : _SUM + 6] - ord("0")
    sums = fields.sum(axis=1, dtype=np.int32)
    sums += 8 * ord(" ") - fields[:, _SUM : _SUM + 8].sum(axis=1, dtype=np.int32)
    sizes, kinds = digits @ _EIGHTS, fields[:, _TYPE]
    is_file, is_extended = (kinds == 0) | (kinds == ord("0")), kinds == _EXTENDED
    extends = np.append(~is_extended[1:], False)
    plain = (
        (digits < 8).all(axis=1)
        & (check_digits < 8).all(axis=1)
        & (sums == check_digits @ _EIGHTS[-6:])
        & (fields[:, _MAGIC : _MAGIC + 5] == list(b"ustar")).all(axis=1)
        & (fields[:, _PREFIX] == 0)
        & (is_file | (is_extended & extends) | ((kinds == ord("5")) & (sizes == 0)))
    )
    names = np.ascontiguousarray(fields[is_file, :100])
    # A name ends at its first zero byte, numpy's bytes end at the last that is none.
    is_set = names != 0
    if not plain.all() or (is_set[:, 1:] & ~is_set[:, :-1]).any():
        return None
    places = np.stack([np.array(offsets), sizes], axis=1)[is_file]
    return Files(names.view("S100").ravel().tolist(), places)


def _is_zero_from(descriptor: int, offset: int) -> bool:
    """Whether an open file ends with two blocks of zeros or more, from an offset on."""
    start = offset
    while data := os.pread(descriptor, 2**20, offset):
        if data.strip(b"\0"):
            return False
        offset += len(data)
    return offset - start >= 2 * _BLOCK
