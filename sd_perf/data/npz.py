"""Arrays in NumPy's files, from bytes that a stranger may have made.

np.load is not used: it allocates whatever shape a header claims, unpacks whatever a zip file holds,
and reads headers of any length. Here all of that is checked against the size of the file first.
"""

from __future__ import annotations

import io
import math
import os
import re
import threading
import zipfile
from typing import Any, BinaryIO

import numpy as np

from sd_perf.files import one_line

MAX_HEADER_BYTES = 16_384
"""bytes before the values of an array, at most; NumPy itself refuses a header of 10,000"""
_MAX_EVALUATED = 10_000
"""bytes of a header that NumPy takes, at most"""
_MAX_ARRAYS = 64
_SIDE = rb"(?:0|[1-9]\d{0,17})"
_PLAIN_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(?P<size>..)"
    rb"\{'descr': '(?P<type><f[248]|<[iu][248]|\|[biu]1)', 'fortran_order': (?P<order>True|False), "
    rb"'shape': \((?P<shape>(?:%b,|%b(?:, %b)+)?)\), \} *\n" % (_SIDE, _SIDE, _SIDE),
    re.DOTALL,
)
"""what NumPy writes before plain numbers"""
_EVALUATING = threading.Lock()
"""CPython 3.11's parser is not safe in threads (python/cpython issue 106905): two that evaluate
headers at once can raise SystemError, and a good sample would pass for a bad one"""


def read_npy_header(beginning: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, whether in Fortran order, dtype, and the offset of the values of a .npy file.

    Needs the first MAX_HEADER_BYTES of the file. Raises ValueError for what is no .npy file.
    """
    plain = _PLAIN_HEADER.match(beginning)
    length = int.from_bytes(plain["size"], "little") if plain else 0
    if plain and length == plain.end() - plain.end("size") <= _MAX_EVALUATED:
        shape = tuple(int(side) for side in plain["shape"].split(b",") if side.strip())
        return shape, plain["order"] == b"True", np.dtype(plain["type"].decode()), plain.end()
    with _EVALUATING:
        return _evaluated_header(beginning)


def _evaluated_header(beginning: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """`read_npy_header` by NumPy, which evaluates the header as Python."""
    stream = io.BytesIO(beginning)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        shape, fortran_order, dtype = readers[np.lib.format.read_magic(stream)](stream)
    except Exception as error:  # so damage is any error
        raise ValueError(one_line(error)) from error
    return shape, fortran_order, dtype, stream.tell()


def read_npz(file: BinaryIO, unpacked: int = 0) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name, read-only.

    Raises ValueError for any other file, and for one whose arrays are larger than itself, as those
    of a compressed one are, and than `unpacked` bytes.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            _require_within(members, max(unpacked, file.seek(0, os.SEEK_END)))
            return {
                member.filename.removesuffix(".npy"): _array(archive.read(member))
                for member in members
            }
    except Exception as error:  # damage of a zip file shows as nearly any error
        raise ValueError(one_line(error)) from error


def _require_within(members: list[zipfile.ZipInfo], size: int) -> None:
    """ValueError for members of a zip file that unpack to more than so many bytes."""
    if len(members) > _MAX_ARRAYS or sum(member.file_size for member in members) > size:
        raise ValueError("its arrays are larger than they may be")


def _array(data: bytes) -> np.ndarray:
    """The array in the bytes of a .npy file, without a copy."""
    shape, fortran_order, dtype, offset = read_npy_header(data[:MAX_HEADER_BYTES])
    count = math.prod(shape)
    if dtype.hasobject or len(data) - offset != count * dtype.itemsize:
        raise ValueError(f"an array of shape {shape} and dtype {dtype} is not in it")
    values = np.frombuffer(data, dtype, count, offset)
    return values.reshape(shape, order="F" if fortran_order else "C")
