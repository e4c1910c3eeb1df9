"""One sample: reading its bytes from a shard, decoding and checking them.

The `parse_*` functions raise BadSampleError with the bare reason as message; the caller, who knows
the sample's key, adds it.

Shape letters: C latent channels, S latent side, T text tokens, D context channels.
"""

from __future__ import annotations

import io
import os
import resource
import weakref
from dataclasses import dataclass

import numpy as np

from sd_perf.config import DataConfig
from sd_perf.data.shards import ShardIndex
from sd_perf.errors import BadSampleError, DataError


@dataclass(frozen=True)
class Sample:
    """A decoded sample."""

    moments: np.ndarray
    """(2C, S, S) float32: mean and log-variance, unscaled"""
    caption: str
    """the caption as stored"""
    context: np.ndarray | None
    """(T, D) float16 or float32 text states, or None"""


def _parse_npy(
    data: bytes, what: str, shape: tuple[int, ...], dtypes: tuple[str, ...]
) -> np.ndarray:
    """The array in a .npy file's bytes, of exactly this shape, one of these dtypes and finite.

    np.load is not used: it would allocate whatever shape a damaged or hostile header claims. Here
    the header is checked first, and the array is a view of `data`.
    """
    stream = io.BytesIO(data)
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    try:
        found_shape, fortran_order, dtype = readers[np.lib.format.read_magic(stream)](stream)
    except (ValueError, KeyError) as error:
        raise BadSampleError(f"{what} is not a .npy array") from error
    if dtype.hasobject:
        raise BadSampleError(f"{what} holds pickled objects, which are refused")
    if dtype not in [np.dtype(name) for name in dtypes]:
        raise BadSampleError(f"{what} has dtype {dtype}, not {' or '.join(dtypes)}")
    if found_shape != shape or fortran_order:
        order = " in Fortran order" if fortran_order else ""
        raise BadSampleError(f"{what} has shape {found_shape}{order}, not {shape}")
    payload = len(data) - stream.tell()
    if payload != np.prod(shape) * dtype.itemsize:
        raise BadSampleError(
            f"{what} has {payload} bytes of values, not {np.prod(shape) * dtype.itemsize}"
        )
    array = np.frombuffer(data, dtype=dtype, offset=stream.tell()).reshape(shape)
    if not np.isfinite(array).all():
        raise BadSampleError(f"{what} has values that are NaN or infinite")
    return array


def parse_moments(data: bytes, channels: int, size: int) -> np.ndarray:
    """Moments (2C, S, S) float32 from the bytes of a .npy file of shape (1, 2C, S, S)."""
    return _parse_npy(data, "moments", (1, 2 * channels, size, size), ("float32",))[0]


def parse_context(data: bytes, tokens: int, channels: int) -> np.ndarray:
    """Text states (T, D), float16 or float32 as stored, from the bytes of a .context.npy file."""
    return _parse_npy(data, "context", (tokens, channels), ("float16", "float32"))


def parse_caption(data: bytes, max_bytes: int, allow_empty: bool) -> str:
    """Caption from the bytes of a .txt file.

    It must be UTF-8, at most max_bytes long, and not blank unless allow_empty.
    """
    if len(data) > max_bytes:
        raise BadSampleError(f"caption has {len(data)} bytes, more than {max_bytes}")
    try:
        caption = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadSampleError(
            f"caption is not UTF-8 ({error.reason} at byte {error.start})"
        ) from error
    if not caption.strip() and not allow_empty:
        raise BadSampleError("caption is empty")
    return caption


def _open_all(index: ShardIndex) -> list[int]:
    """Open every shard; returns one file descriptor per shard.

    The soft limit of open files is often 1024. It is raised to make room for the shards, as far as
    the hard limit allows.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = len(index.shards) + 1024
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE,
            (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard),
        )
    descriptors: list[int] = []
    try:
        for name in index.shards:
            descriptors.append(os.open(index.folder / name, os.O_RDONLY))
    except OSError as error:
        _close_all(descriptors)
        raise DataError(f"{index.folder / name} cannot be opened: {error.strerror}") from error
    return descriptors


def _close_all(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


class SampleReader:
    """Reads samples of a shard set by their number. Any thread may call it.

    It keeps a file descriptor per shard, closed when the object is collected.
    """

    def __init__(
        self, index: ShardIndex, config: DataConfig, in_channels: int, context_dim: int
    ) -> None:
        self._index = index
        self._config = config
        self._in_channels = in_channels
        self._context_dim = context_dim
        self._descriptors = _open_all(index)
        self._states = self._fstat()
        weakref.finalize(self, _close_all, self._descriptors)

    def _fstat(self) -> list[tuple[int, int]]:
        """Size (bytes) and modification time (ns) of every shard that is open."""
        states = map(os.fstat, self._descriptors)
        return [(state.st_size, state.st_mtime_ns) for state in states]

    def require_unchanged(self) -> None:
        """DataError where a shard was written to since it was opened.

        A shard that was replaced by another file of its name is read on as it was.
        """
        pairs = zip(self._index.shards, self._states, self._fstat(), strict=True)
        for name, before, now in pairs:
            if now != before:
                raise DataError(
                    f"{self._index.folder / name} was written to while it was read; samples since "
                    "the last checkpoint may be of either content: bring the shard back and resume"
                )

    def _part(self, row: np.void, part: str) -> bytes:
        size, offset = int(row[f"{part}_size"]), int(row[f"{part}_offset"])
        try:
            # pread takes the offset as an argument, so threads can share a descriptor
            data = os.pread(self._descriptors[row["shard"]], size, offset)
        except OSError as error:
            shard = self._index.folder / self._index.shards[row["shard"]]
            raise DataError(f"{shard} cannot be read at byte {offset}: {error.strerror}") from error
        if len(data) != size:
            raise BadSampleError(
                f"{part} ends after {len(data)} of {size} bytes; the shard shrank since it was "
                "indexed"
            )
        return data

    def read(self, sample: int) -> Sample:
        """Read and decode a sample. BadSampleError, with the bare reason, for unusable bytes."""
        row, config = self._index.samples[sample], self._config
        moments = parse_moments(self._part(row, "moments"), self._in_channels, config.latent_size)
        caption = parse_caption(
            self._part(row, "caption"),
            max_bytes=config.max_caption_bytes,
            allow_empty=config.allow_empty_captions,
        )
        context = None
        if config.context == "precomputed":
            context = parse_context(
                self._part(row, "context"), config.context_tokens, self._context_dim
            )
        return Sample(moments, caption, context)
