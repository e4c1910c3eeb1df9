"""The quick way from a shard into a batch: the bytes of an array go from the file to its row.

A sample of the benchmark is 128 KB of moments that need no decoding. What is as usual is read here
without a copy; all else is left to `sd_perf.data.samples`, which says what is wrong with it.
"""

from __future__ import annotations

import os
import threading

import numpy as np
import torch

from sd_perf.config import DataConfig
from sd_perf.data.npz import MAX_HEADER_BYTES, read_npy_header
from sd_perf.data.samples import parse_caption
from sd_perf.data.shards import ShardIndex
from sd_perf.errors import BadSampleError

_SERIAL = 2**15 - 1
"""numbers that torch converts within the thread that asks; more it divides among others"""


class QuickRows:
    """Reads samples by their number into rows of arrays. Any thread may call it."""

    def __init__(self, index: ShardIndex, descriptors: list[int], config: DataConfig) -> None:
        """`descriptors` are those of the index's shards, open."""
        self._index, self._descriptors, self._config = index, descriptors, config
        self._usual: dict[str, bytes] = {}
        self._scratch = threading.local()

    def read(self, number: int, parts: dict[str, np.ndarray]) -> str | None:
        """Fill the arrays of a sample's parts; returns its caption.

        None where the sample is not as usual: then the arrays hold anything. A part that is stored
        as float16 may be asked for as float32.
        """
        row = self._index.samples[number]
        descriptor = self._descriptors[row["shard"]]
        try:
            for part, out in parts.items():
                offset, size = int(row[f"{part}_offset"]), int(row[f"{part}_size"])
                if not self._read_array(part, descriptor, offset, size, out):
                    return None
            return self._read_caption(descriptor, row)
        except (OSError, BadSampleError):
            return None

    def _read_caption(self, descriptor: int, row: np.void) -> str | None:
        size, limit = int(row["caption_size"]), self._config.max_caption_bytes
        data = os.pread(descriptor, min(size, limit), int(row["caption_offset"]))
        whole = len(data) == size
        return parse_caption(data, limit, self._config.allow_empty_captions) if whole else None

    def _read_array(
        self, part: str, descriptor: int, offset: int, size: int, out: np.ndarray
    ) -> bool:
        """Fill `out`; False where that is not what is stored, or not finite."""
        values = out
        if out.dtype == np.float32 and size < out.nbytes:  # then it is stored as float16
            values = self._halves(out.shape)
        header = bytearray(size - values.nbytes) if size >= values.nbytes else None
        if header is None or len(header) > MAX_HEADER_BYTES:
            return False
        read = os.preadv(descriptor, [header, values.data.cast("B")], offset)
        if read < size or not self._is_right(part, header, values):
            return False
        if values is not out:
            _convert(values, out)
        return _is_finite(out)

    def _halves(self, shape: tuple[int, ...]) -> np.ndarray:
        """This thread's own float16 array, to read what becomes float32."""
        arrays = vars(self._scratch)
        if arrays.get("halves") is None or arrays["halves"].shape != shape:
            arrays["halves"] = np.empty(shape, np.float16)
        return arrays["halves"]

    def _is_right(self, part: str, header: bytearray, values: np.ndarray) -> bool:
        """Whether the header of a .npy file says that these values follow it.

        Encoded shards have none: their rows are of one shape, which was looked at when they were
        opened.
        """
        if self._index.format == "encoded":
            return not header
        if header == self._usual.get(part):
            return True
        try:
            shape, fortran_order, dtype, offset = read_npy_header(bytes(header))
        except ValueError:
            return False
        stored = (1, *values.shape) if part == "moments" else values.shape
        if (shape, fortran_order, dtype, offset) != (stored, False, values.dtype, len(header)):
            return False
        self._usual[part] = bytes(header)
        return True


def _convert(source: np.ndarray, target: np.ndarray) -> None:
    """Copy float16 into float32, by torch: numpy takes fifteen times as long."""
    pieces = -(-source.size // _SERIAL)
    sources, targets = (torch.from_numpy(each).view(-1).chunk(pieces) for each in (source, target))
    for piece, place in zip(sources, targets, strict=True):
        place.copy_(piece)


def _is_finite(values: np.ndarray) -> bool:
    if values.dtype == np.float16:  # as integers: numpy's isfinite of it takes much longer
        return bool((values.view(np.uint16) & 0x7FFF).max(initial=0) < 0x7C00)
    return bool(np.isfinite(values).all())
