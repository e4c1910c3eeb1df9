"""Encoded shards: what a frozen autoencoder and text tower gave, in 16 bits, in safetensors files.

A shard holds arrays of one row per sample, so that byte offsets follow from the row and nothing of
a sample has to be parsed. docs/data.md has the layout.

Shape letters: N samples, M text states, 2C moment channels, S latent side, T text tokens, D context
channels, K bytes of the longest key, L bytes of all captions.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sd_perf.data.formats import FORMATS
from sd_perf.errors import DataError
from sd_perf.files import misfit, one_line, opened_untrusted, parse_json

HEADER_BYTES = 4096
"""before the first array: a page, so that the moments of the benchmark's size begin on pages"""
VERSION = "1"
_MAX_HEADER = 2**20
_MAX_SAMPLES, _MAX_KEY = 10**7, 2**12
"""of one shard, and bytes of a key: what the index takes memory for"""
_REMEDY = "make it again with `sd-perf data encode`"
_DTYPES = {"F16": "<f2", "I64": "<i8", "U8": "|u1"}
_RANKS = {
    "moments": ("F16", 4),
    "context": ("F16", 3),
    "states": ("I64", 1),
    "caption_ends": ("I64", 1),
    "keys": ("U8", 2),
    "captions": ("U8", 1),
}
"""array: (dtype as safetensors names it, number of axes), in the order of the file"""
_OPTIONAL = ("context", "states")
_PER_SAMPLE = ("moments", "caption_ends", "keys", "states")
"""arrays of one row per sample"""
_HEADER_SHAPE = {
    "__metadata__": {"sd_perf": str, "shard": str, "shards": str, "recipe": str, "facts": str}
}


@dataclass(frozen=True)
class Array:
    """The place of an array in a shard."""

    dtype: str
    """as safetensors names it"""
    shape: tuple[int, ...]
    offset: int
    """bytes from the beginning of the file"""

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * np.dtype(_DTYPES[self.dtype]).itemsize

    @property
    def size(self) -> int:
        """bytes"""
        return self.shape[0] * self.row_bytes

    def read(self, file: BinaryIO) -> np.ndarray:
        """The whole array; ValueError where the file has become shorter."""
        file.seek(self.offset)
        return np.frombuffer(file.read(self.size), _DTYPES[self.dtype]).reshape(self.shape)


@dataclass(frozen=True)
class Layout:
    """The header of an encoded shard.

    Arrays: moments (N, 2C, S, S) float16, mean then log-variance, NaN where the sample could not be
    encoded; caption_ends (N,), where in captions (L,), UTF-8, each caption ends; keys (N, K), bytes
    padded with zeros. Where text states are stored: context (M, T, D) float16, those of each
    caption once, and states (N,), the row of a sample's.
    """

    arrays: dict[str, Array]
    shard: int = 0
    """number of the shard in its set"""
    shards: int = 1
    """shards of the set"""
    recipe: dict[str, Any] = field(default_factory=dict)
    """what was encoded by what: equal for all shards of a set"""
    facts: dict[str, Any] = field(default_factory=dict)
    """what was measured of the shard"""

    def header(self) -> bytes:
        """The first HEADER_BYTES of the file, as safetensors has them."""
        entries: dict[str, Any] = {
            "__metadata__": {
                "format": "pt",
                "sd_perf": VERSION,
                "shard": str(self.shard),
                "shards": str(self.shards),
                "recipe": json.dumps(self.recipe, sort_keys=True),
                "facts": json.dumps(self.facts),
            }
        }
        for name, array in self.arrays.items():
            begin = array.offset - HEADER_BYTES
            span = [begin, begin + array.size]
            entries[name] = {"dtype": array.dtype, "shape": array.shape, "data_offsets": span}
        text = json.dumps(entries).encode().ljust(HEADER_BYTES - 8)
        if len(text) != HEADER_BYTES - 8:
            raise ValueError(f"a header of {len(text)} bytes")
        return len(text).to_bytes(8, "little") + text


def new_layout(
    keys: Sequence[bytes],
    captions: Sequence[bytes],
    moments: tuple[int, int, int],
    context: tuple[int, int, int] | None,
) -> Layout:
    """The layout for samples of these keys and captions.

    `moments` is (2C, S, S); `context` is (M, T, D), or None where no text states are stored.
    """
    num = len(keys)
    shapes: dict[str, tuple[int, ...]] = {"moments": (num, *moments)}
    if context is not None:
        shapes |= {"context": context, "states": (num,)}
    longest = max([1, *map(len, keys)])
    total = sum(map(len, captions))
    shapes |= {"caption_ends": (num,), "keys": (num, longest), "captions": (total,)}
    arrays, offset = {}, HEADER_BYTES
    for name, shape in shapes.items():
        arrays[name] = Array(_RANKS[name][0], shape, offset)
        offset += arrays[name].size
    return Layout(arrays)


def read_layout(path: Path, file: BinaryIO | None = None) -> Layout:
    """The layout of a shard that is whole; DataError for any other file."""
    if file is None:
        with opened_untrusted(path, _REMEDY, DataError) as opened:
            return read_layout(path, opened)
    size = file.seek(0, os.SEEK_END)
    try:
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= min(_MAX_HEADER, size - 8):
            raise ValueError("it has no header")
        layout = _parsed(parse_json(file.read(length)), 8 + length)
        end = max(array.offset + array.size for array in layout.arrays.values())
        if size != end:
            raise ValueError(f"it has {size:,} bytes, not {end:,}")
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is no encoded shard ({one_line(error)}); {_REMEDY}") from error
    return layout


def _parsed(header: Any, begin: int) -> Layout:
    """The layout in a header; ValueError for what is none. `begin` is the offset of the arrays."""
    if not isinstance(header, dict) or (fault := misfit(header, _HEADER_SHAPE)):
        raise ValueError(fault if isinstance(header, dict) else "its header is no object")
    about, arrays, end = header["__metadata__"], {}, 0
    if about["sd_perf"] != VERSION:
        raise ValueError(f"it has version {about['sd_perf'][:20]!r}, and {VERSION} is read")
    entry_shape = {"dtype": str, "shape": [int], "data_offsets": [int]}
    for name, (dtype, axes) in _RANKS.items():
        if name in _OPTIONAL and name not in header:
            continue
        if fault := misfit(header, {name: entry_shape}):
            raise ValueError(fault)
        entry = header[name]
        array = Array(entry["dtype"], tuple(entry["shape"]), begin + end)
        right = array.dtype == dtype and len(array.shape) == axes and min(array.shape) >= 0
        if not right or entry["data_offsets"] != [end, end + array.size]:
            raise ValueError(f"its array {name} is not {dtype} of {axes} axes in its place")
        arrays[name], end = array, end + array.size
    per_sample = [arrays[name] for name in _PER_SAMPLE if name in arrays]
    num = per_sample[0].shape[0]
    if num > _MAX_SAMPLES or arrays["keys"].shape[1] > _MAX_KEY:
        raise ValueError("it has more samples, or longer keys, than a shard may have")
    same = all(array.shape[0] == num for array in per_sample)
    if not same or ("context" in arrays) != ("states" in arrays):
        raise ValueError("its arrays are not of one number of samples")
    recipe, facts = parse_json(about["recipe"]), parse_json(about["facts"])
    return Layout(arrays, int(about["shard"]), int(about["shards"]), recipe, facts)


def scan_encoded(path: Path, number: int) -> np.ndarray:
    """Index rows of an encoded shard; see `sd_perf.data.shards.scan_shard`."""
    with opened_untrusted(path, _REMEDY, DataError) as file:
        layout = read_layout(path, file)
        small = {
            name: array.read(file)
            for name, array in layout.arrays.items()
            if name in ("states", "caption_ends", "keys")
        }
    return _rows(path, number, layout, small)


def require_whole(paths: Sequence[Path]) -> None:
    """DataError where these shards, by name, are not all shards of one set.

    A set that `data encode` has not finished would be trained on as a smaller one.
    """
    first: Layout | None = None
    for number, path in enumerate(paths):
        layout = read_layout(path)
        first = first or layout
        if (layout.shard, layout.shards) != (number, len(paths)) or layout.recipe != first.recipe:
            raise DataError(
                f"{path} is shard {layout.shard + 1} of {layout.shards} and stands at place "
                f"{number + 1} of {len(paths)} in its folder; finish the set with the same "
                "`sd-perf data encode`, and move away what is of another"
            )


def _rows(path: Path, number: int, layout: Layout, small: dict[str, np.ndarray]) -> np.ndarray:
    moments, captions = layout.arrays["moments"], layout.arrays["captions"]
    num, width = layout.arrays["keys"].shape
    rows = np.zeros(num, FORMATS["encoded"].row_type(width))
    ends = small["caption_ends"]
    begins = np.concatenate([np.zeros(1, np.int64), ends[:-1]]) if num else ends
    in_order = (begins <= ends).all() and (not num or ends[-1] == captions.size)
    states = small.get("states", np.zeros(0, np.int64))
    held = layout.arrays["context"].shape[0] if "context" in layout.arrays else 0
    if not in_order or ((states < 0) | (states >= held)).any():
        raise DataError(f"{path} is no encoded shard (its rows lead outside of it); {_REMEDY}")
    rows["shard"] = number
    rows["key"] = small["keys"].reshape(-1).view(f"S{width}") if num and width else b""
    rows["moments_offset"] = moments.offset + moments.row_bytes * np.arange(num)
    rows["moments_size"] = moments.row_bytes
    rows["caption_offset"], rows["caption_size"] = captions.offset + begins, ends - begins
    if held:
        context = layout.arrays["context"]
        rows["context_offset"] = context.offset + context.row_bytes * states
        rows["context_size"] = context.row_bytes
    return rows


def require_fits(path: Path, moments: tuple[int, ...], context: tuple[int, ...] | None) -> None:
    """DataError where the rows of a shard have other shapes than these.

    `moments` is (2C, S, S); `context` is (T, D), or None where text states are not read.
    """
    layout = read_layout(path)
    for name, right in (("moments", moments), ("context", context)):
        if right is None or name not in layout.arrays:
            continue
        shape = layout.arrays[name].shape[1:]
        if shape != right:
            raise DataError(
                f"{path}: its {name} have shape {shape}, and the config's model and data take "
                f"{right}; train with the config that the shards were encoded for"
            )
