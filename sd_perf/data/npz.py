"""Arrays in NumPy's files, from bytes that a stranger may have made.

np.load is not used: it allocates whatever shape a header claims, unpacks whatever a zip file holds,
and reads headers of any length. Here all of that is checked against the size of the file first.
"""

from __future__ import annotations

import io
import math
import os
import zipfile
from typing import Any, BinaryIO

import numpy as np

from sd_perf.files import one_line

MAX_HEADER_BYTES = 16_384
"""bytes before the values of an array, at most; NumPy itself refuses a header of 10,000"""
_MAX_ARRAYS = 64


def read_npy_header(beginning: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
    """Shape, whether in Fortran order, dtype, and the offset of the values of a .npy file.

    Needs the first MAX_HEADER_BYTES of the file. Raises ValueError for what is no .npy file.
    """
    stream = io.BytesIO(beginning)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        shape, fortran_order, dtype = readers[np.lib.format.read_magic(stream)](stream)
    except Exception as error:  # NumPy evaluates the header as Python, so damage is any error
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
