"""Where the files of a plain tar file lie, read from its headers alone.

Python's tarfile knows every kind of tar file and takes some 30 microseconds a header. The shards of
the benchmark have twenty to forty million headers, nearly all of one plain kind, which is read
here. What is not plain is left to tarfile, which also says what is wrong with it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_BLOCK = 512
_WINDOW = 12 * _BLOCK
"""bytes read at a time, half of them where no header is extended: the headers of small files that
follow each other come together"""
_WINDOWS = 256
"""windows whose headers are checked at a time; bounds the memory"""
_SIZE, _SUM, _TYPE, _MAGIC, _PREFIX = 124, 148, 156, 257, 345
"""bytes of a header at which its fields begin"""
_EMPTY, _EXTENDED = bytes(_BLOCK), ord("x")
_EIGHTS = 8 ** np.arange(10, -1, -1)
_USUAL = 40
"""bytes of an extended header that holds the time of a change, at most, and fewer than 100"""
_TIME = re.compile(rb"([0-9]+) [amc]time=[0-9.]+\n")
"""record of an extended header that says nothing of the file but a time"""


class Files(NamedTuple):
    """Regular files of a tar file, in its order."""

    names: list[bytes]
    places: np.ndarray
    """(files, 2) int64: offset of the content in the tar file, and size, bytes"""


class _Headers(NamedTuple):
    """Where headers lie in what was read."""

    blocks: list[int]
    """those of files"""
    offsets: list[int]
    """in the tar file, of what follows each"""
    extended: list[int]
    """blocks of extended headers; the next block is the content of each"""


def read_plain_headers(descriptor: int) -> Files | None:
    """The regular files of an open tar file.

    None where it is not plain, not whole, or no tar file. Plain: headers with right checksums, of
    regular files and folders whose names have at most 100 bytes, each perhaps behind an extended
    header that holds times; zeros behind the end.
    """
    buffer = bytearray(_WINDOWS * _WINDOW)
    read = np.frombuffer(buffer, np.uint8).reshape(-1, _BLOCK)
    found = []
    for headers, end in _walk(descriptor, buffer):
        some = _plain_files(headers, read)
        if some is None or (headers.extended and not _hold_times(read, headers.extended)):
            return None
        found.append(some)
        if end is not None:
            names = [name for files in found for name in files.names]
            all_of_them = Files(names, np.concatenate([files.places for files in found]))
            return all_of_them if _is_zero_from(descriptor, end) else None
    return None


def _walk(descriptor: int, buffer: bytearray) -> Iterator[tuple[_Headers, int | None]]:
    """Headers, read into the buffer as far as it has room; with the last ones the archive's end.

    Ends early at what cannot be followed. Offsets only grow.
    """
    view, headers = memoryview(buffer), _Headers([], [], [])
    start, begin, length = 0, 0, _WINDOW // 2
    while count := os.preadv(descriptor, [view[begin : begin + length]], start):
        at, last = begin, begin + count - _BLOCK
        while at <= last:
            is_extended = buffer[at + _TYPE] == _EXTENDED
            header = at + 2 * _BLOCK if is_extended else at
            if header > last:
                break  # it is read again, with what follows it
            size = _size(buffer[header + _SIZE : header + _SIZE + 11])
            if size < 0 and buffer[at : at + _BLOCK] == _EMPTY:
                yield headers, start + at - begin
            if size < 0:
                return
            if is_extended:
                headers.extended.append(at // _BLOCK)
                length = _WINDOW
            headers.blocks.append(header // _BLOCK)
            headers.offsets.append(start + header + _BLOCK - begin)
            at = header + _BLOCK + (size + _BLOCK - 1) // _BLOCK * _BLOCK
        if at == begin:  # the file has ended within a header
            return
        start, begin = start + at - begin, begin + _WINDOW
        if begin == len(buffer):
            yield headers, None
            headers, begin = _Headers([], [], []), 0


def _size(digits: bytearray) -> int:
    """What octal digits say; below zero where they say nothing."""
    try:
        return int(digits, 8)
    except ValueError:
        return -1


def _plain_files(headers: _Headers, read: np.ndarray) -> Files | None:
    """The regular files of headers in the blocks read (N, 512); None where one is not plain."""
    fields = read[headers.blocks]
    is_right, sizes, kinds = _fields(fields)
    is_file = (kinds == 0) | (kinds == ord("0"))
    names = np.ascontiguousarray(fields[is_file, :100])
    # A name ends at its first zero byte, numpy's bytes end at the last that is none.
    is_set = names != 0
    goes_on = is_set[:, 1:] & ~is_set[:, :-1]
    if not (is_right & (is_file | ((kinds == ord("5")) & (sizes == 0)))).all() or goes_on.any():
        return None
    places = np.stack([np.array(headers.offsets, np.int64), sizes], axis=1)[is_file]
    return Files(names.view("S100").ravel().tolist(), places)


def _fields(headers: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of headers (N, 512): whether each is as it should be, the size it says, and its kind."""
    digits = headers[:, _SIZE : _SIZE + 11] - ord("0")
    check_digits = headers[:, _SUM : _SUM + 6] - ord("0")
    sums = headers.sum(axis=1, dtype=np.int32)
    sums += 8 * ord(" ") - headers[:, _SUM : _SUM + 8].sum(axis=1, dtype=np.int32)
    is_right = (
        (digits < 8).all(axis=1)
        & (check_digits < 8).all(axis=1)
        & (sums == check_digits @ _EIGHTS[-6:])
        & (headers[:, _MAGIC : _MAGIC + 5] == list(b"ustar")).all(axis=1)
        & (headers[:, _PREFIX] == 0)
    )
    return is_right, digits @ _EIGHTS, headers[:, _TYPE]


def _hold_times(read: np.ndarray, extended: list[int]) -> bool:
    """Whether extended headers at these blocks of what was read (N, 512) hold times alone."""
    is_right, sizes, _ = _fields(read[extended])
    if not (is_right & (sizes <= _BLOCK)).all():
        return False
    content = read[np.array(extended, np.int64) + 1, :_USUAL]
    # One record of a time: by far the most. Others are looked at one by one.
    at, is_number = np.arange(_USUAL), (content - ord("0") < 10) | (content == ord("."))
    ends = sizes[:, None] - 1
    is_usual = (
        (sizes <= _USUAL)
        & (content[:, :2] @ [10, 1] - 11 * ord("0") == sizes)
        & (content[:, 2:9] == list(b" mtime=")).all(axis=1)
        & (is_number | (at < 9) | (at >= ends)).all(axis=1)
        & ((content == ord("\n")) | (at != ends)).all(axis=1)
    )
    odd = np.flatnonzero(~is_usual).tolist()
    return all(_are_times(read[extended[row] + 1, : sizes[row]].tobytes()) for row in odd)


def _are_times(content: bytes) -> bool:
    """Whether the content of an extended header is records of times, each as long as it says."""
    end = 0
    while end < len(content):
        match = _TIME.match(content, end)
        if match is None or int(match[1]) != match.end() - end:
            return False
        end = match.end()
    return end > 0


def _is_zero_from(descriptor: int, offset: int) -> bool:
    """Whether an open file ends with two blocks of zeros or more, from an offset on."""
    start = offset
    while data := os.pread(descriptor, 2**20, offset):
        if data.strip(b"\0"):
            return False
        offset += len(data)
    return offset - start >= 2 * _BLOCK
