"""Where the files of a plain tar file lie, read from its headers alone.

Python's tarfile knows every kind of tar file and takes some 30 microseconds a header. The shards of
the benchmark have twenty to forty million headers, nearly all of one plain kind, which is read
here. What is not plain is left to tarfile, which also says what is wrong with it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

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

File = tuple[bytes, int, int]
"""name, offset of the content in the tar file, and size (bytes)"""


def read_plain_headers(descriptor: int) -> list[File] | None:
    """The regular files of an open tar file, in its order.

    None where it is not plain, not whole, or no tar file. Plain: headers with right checksums, of
    regular files and folders whose names have at most 100 bytes, each perhaps behind an extended
    header that holds times; zeros behind the end.
    """
    files: list[File] = []
    for headers, places, end in _walk(descriptor):
        chunk = _plain_files(headers, places)
        if chunk is None:
            return None
        files += chunk
        if end is not None:
            return files if _is_zero_from(descriptor, end) else None
    return None


def _walk(descriptor: int) -> Iterator[tuple[list[bytes], list[int], int | None]]:
    """Headers and the offsets behind them, by chunks; with the last one the end of the archive.

    Ends early at what cannot be followed. Offsets only grow.
    """
    window, start, offset, extended = b"", 0, 0, False
    headers: list[bytes] = []
    places: list[int] = []
    while True:
        header = window[offset - start : offset - start + _BLOCK]
        if len(header) < _BLOCK:
            window, start = os.pread(descriptor, _WINDOW, offset), offset
            header = window[:_BLOCK]
        if header == _EMPTY and not extended:
            yield headers, places, offset
            return
        try:
            size = int(header[_SIZE : _SIZE + 11], 8)
        except ValueError:  # also where the file has ended
            return
        if size < 0 or len(header) < _BLOCK:
            return
        offset += _BLOCK
        headers.append(header)
        places.append(offset)
        was_extended, extended = extended, header[_TYPE] == _EXTENDED
        if extended:
            content = window[offset - start : offset - start + size]
            if len(content) < size:
                content = os.pread(descriptor, min(size, _WINDOW), offset)
            if was_extended or not _holds_times(content):
                return
        offset += (size + _BLOCK - 1) // _BLOCK * _BLOCK
        if len(headers) == _CHUNK:
            yield headers, places, None
            headers, places = [], []


def _holds_times(content: bytes) -> bool:
    """Whether the content of an extended header is records of times, each as long as it says."""
    end = 0
    while match := _TIME.match(content, end):
        if int(match[1]) != match.end() - end:
            return False
        end = match.end()
    return end == len(content) > 0


def _plain_files(headers: list[bytes], places: list[int]) -> list[File] | None:
    """The regular files of headers and offsets behind them; None where a header is not plain."""
    fields = np.frombuffer(b"".join(headers), np.uint8).reshape(-1, _BLOCK)
    digits = fields[:, _SIZE : _SIZE + 11] - ord("0")
    check_digits = fields[:, _SUM : _SUM + 6] - ord("0")
    sums = fields.sum(axis=1, dtype=np.int32)
    sums += 8 * ord(" ") - fields[:, _SUM : _SUM + 8].sum(axis=1, dtype=np.int32)
    sizes, kinds = digits @ _EIGHTS, fields[:, _TYPE]
    is_file = (kinds == 0) | (kinds == ord("0"))
    plain = (
        (digits < 8).all(axis=1)
        & (check_digits < 8).all(axis=1)
        & (sums == check_digits @ _EIGHTS[-6:])
        & (fields[:, _MAGIC : _MAGIC + 5] == list(b"ustar")).all(axis=1)
        & (fields[:, _PREFIX] == 0)
        & (is_file | (kinds == _EXTENDED) | ((kinds == ord("5")) & (sizes == 0)))
    )
    if not plain.all():
        return None
    return [
        (header[:100].partition(b"\0")[0], place, size)
        for header, place, size, is_one in zip(
            headers, places, sizes.tolist(), is_file.tolist(), strict=True
        )
        if is_one
    ]


def _is_zero_from(descriptor: int, offset: int) -> bool:
    """Whether an open file ends with two blocks of zeros or more, from an offset on."""
    start = offset
    while data := os.pread(descriptor, 2**20, offset):
        if data.strip(b"\0"):
            return False
        offset += len(data)
    return offset - start >= 2 * _BLOCK
