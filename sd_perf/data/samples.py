"""One sample: reading its bytes from a shard, decoding and checking them.

The `parse_*` functions raise BadSampleError with the bare reason as message; the caller, who knows
the sample's key, adds it.

Shape letters: C latent channels, S latent side, P side of a picture, T text tokens, D context
channels.
"""

from __future__ import annotations

import math
import os
import resource
import weakref
from dataclasses import dataclass

import numpy as np

from sd_perf.config import DataConfig
from sd_perf.data.encoded import require_fits
from sd_perf.data.formats import MAX_IMAGE_BYTES
from sd_perf.data.images import ImageRange, load_picture
from sd_perf.data.npz import MAX_HEADER_BYTES, read_npy_header
from sd_perf.data.resize import AS_IT_IS, View
from sd_perf.data.shards import ShardIndex
from sd_perf.errors import BadSampleError, DataError
from sd_perf.models.vae import PIXELS_PER_LATENT
from sd_perf.optional import optional


@dataclass(frozen=True)
class Sample:
    """A decoded sample."""

    moments: np.ndarray | None
    """(2C, S, S) float32, float16 of an encoded shard: mean and log-variance, unscaled; None of a
    raw shard"""
    caption: str
    """the caption as stored"""
    context: np.ndarray | None = None
    """(T, D) float16 or float32 text states, or None"""
    pixels: np.ndarray | None = None
    """(3, P, P) float32 of a raw shard, in the range of data.image_range"""


def _parse_npy(
    data: bytes, what: str, shape: tuple[int, ...], dtypes: tuple[str, ...], stored: int | None
) -> np.ndarray:
    """The array in a .npy file's bytes, of exactly this shape, one of these dtypes and finite.

    The array is a view of `data`. `stored` is the size of the file in bytes where `data` is but its
    beginning, because the file is larger than the array could be.
    """
    try:
        found_shape, fortran_order, dtype, offset = read_npy_header(data[:MAX_HEADER_BYTES])
    except ValueError as error:
        raise BadSampleError(f"{what} is not a .npy array") from error
    if dtype.hasobject:
        raise BadSampleError(f"{what} holds pickled objects, which are refused")
    if dtype not in [np.dtype(name) for name in dtypes]:
        raise BadSampleError(f"{what} has dtype {str(dtype)[:100]}, not {' or '.join(dtypes)}")
    if found_shape != shape or fortran_order:
        order = " in Fortran order" if fortran_order else ""
        raise BadSampleError(f"{what} has shape {str(found_shape)[:100]}{order}, not {shape}")
    right = math.prod(shape) * dtype.itemsize
    payload = (len(data) if stored is None else stored) - offset
    if payload != right:
        raise BadSampleError(f"{what} has {payload} bytes of values, not {right}")
    array = np.frombuffer(data, dtype=dtype, offset=offset).reshape(shape)
    if not np.isfinite(array).all():
        raise BadSampleError(f"{what} has values that are NaN or infinite")
    return array


def parse_moments(data: bytes, channels: int, size: int, stored: int | None = None) -> np.ndarray:
    """Moments (2C, S, S) float32 from the bytes of a .npy file of shape (1, 2C, S, S).

    `stored` is the size of the file, where `data` is but its beginning.
    """
    return _parse_npy(data, "moments", (1, 2 * channels, size, size), ("float32",), stored)[0]


def parse_context(data: bytes, tokens: int, channels: int, stored: int | None = None) -> np.ndarray:
    """Text states (T, D), float16 or float32 as stored, from the bytes of a .context.npy file.

    `stored` is the size of the file, where `data` is but its beginning.
    """
    return _parse_npy(data, "context", (tokens, channels), ("float16", "float32"), stored)


def parse_halves(data: bytes, what: str, shape: tuple[int, ...]) -> np.ndarray:
    """The values of an encoded shard, float16 of this shape, from their bytes.

    The array is a view of `data`, which has the right length.
    """
    # As integers: numpy's isfinite of float16 takes several times as long.
    if (np.frombuffer(data, "<u2") & 0x7FFF).max(initial=0) >= 0x7C00:
        raise BadSampleError(f"{what} has values that are NaN or infinite")
    return np.frombuffer(data, "<f2").reshape(shape)


def parse_picture(
    data: bytes, size: int, image_range: ImageRange, view: View = AS_IT_IS
) -> np.ndarray:
    """Pixels (3, size, size) float32 from the bytes of an image file; see `load_picture`."""
    try:
        return load_picture(data, size, image_range, view=view).numpy()
    except DataError as error:
        raise BadSampleError(str(error).removesuffix("; mend or remove it")) from error


def require_caption_size(size: int, max_bytes: int) -> None:
    """BadSampleError for a caption of more bytes than are taken; to be asked before it is read."""
    if size > max_bytes:
        raise BadSampleError(f"caption has {size} bytes, more than {max_bytes}")


def parse_caption(data: bytes, max_bytes: int, allow_empty: bool) -> str:
    """Caption from the bytes of a .txt file.

    It must be UTF-8, at most max_bytes long, and not blank unless allow_empty.
    """
    require_caption_size(len(data), max_bytes)
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
        self._require_readable()
        self._descriptors = _open_all(index)
        self._states = self._fstat()
        weakref.finalize(self, _close_all, self._descriptors)

    def _require_readable(self) -> None:
        """Raise what every sample would have: no Pillow, or arrays of other shapes."""
        config, channels, side = self._config, 2 * self._in_channels, self._config.latent_size
        if self._index.format == "raw":
            optional("PIL.Image", "images need Pillow", "images")
        text = config.context_tokens, self._context_dim
        context = text if config.context == "precomputed" else None
        for name in self._index.shards if self._index.format == "encoded" else ():
            require_fits(self._index.folder / name, (channels, side, side), context)

    @property
    def descriptors(self) -> list[int]:
        """One of each shard of the index, open as long as this object lives."""
        return self._descriptors

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

    def _part(self, row: np.void, part: str, limit: int) -> tuple[bytes, int]:
        """The bytes of a part of a sample, `limit` at most, and the size of all of it."""
        stored, offset = int(row[f"{part}_size"]), int(row[f"{part}_offset"])
        size = min(stored, limit)
        try:
            # pread takes the offset as an argument, so threads can share a descriptor
            data = os.pread(self._descriptors[row["shard"]], size, offset)
        except OSError as error:
            shard = self._index.folder / self._index.shards[row["shard"]]
            raise DataError(f"{shard} cannot be read at byte {offset}: {error.strerror}") from error
        if len(data) != size:
            raise BadSampleError(
                f"{part} ends after {len(data)} of {stored} bytes; the shard shrank since it was "
                "indexed"
            )
        return data, stored

    def read(self, sample: int, view: View = AS_IT_IS) -> Sample:
        """Read and decode a sample, its picture in this view.

        BadSampleError, with the bare reason, for unusable bytes. Never reads more of a part than
        the config lets it have.
        """
        row = self._index.samples[sample]
        is_raw = self._index.format == "raw"
        pixels = self._pixels(row, view) if is_raw else None
        moments = None if is_raw else self._moments(row)
        caption = self._caption(row)
        context = self._context(row) if self._config.context == "precomputed" else None
        return Sample(moments, caption, context, pixels)

    def caption(self, sample: int) -> str:
        """The caption alone, as `read` has it."""
        return self._caption(self._index.samples[sample])

    def picture(self, sample: int) -> bytes:
        """The image file of a sample of a raw shard."""
        return self._picture(self._index.samples[sample])

    def _picture(self, row: np.void) -> bytes:
        size = int(row["picture_size"])
        if size > MAX_IMAGE_BYTES:
            raise BadSampleError(f"picture has {size:,} bytes, more than {MAX_IMAGE_BYTES:,}")
        return self._part(row, "picture", MAX_IMAGE_BYTES)[0]

    def _pixels(self, row: np.void, view: View) -> np.ndarray:
        side = PIXELS_PER_LATENT * self._config.latent_size
        return parse_picture(self._picture(row), side, self._config.image_range, view)

    def _moments(self, row: np.void) -> np.ndarray:
        channels, side = self._in_channels, self._config.latent_size
        if self._index.format == "encoded":
            data, _ = self._part(row, "moments", int(row["moments_size"]))
            return parse_halves(data, "moments", (2 * channels, side, side))
        data, stored = self._part(row, "moments", MAX_HEADER_BYTES + 4 * 2 * channels * side**2)
        return parse_moments(data, channels, side, stored)

    def _caption(self, row: np.void) -> str:
        config = self._config
        require_caption_size(int(row["caption_size"]), config.max_caption_bytes)
        data, _ = self._part(row, "caption", config.max_caption_bytes)
        return parse_caption(
            data,
            max_bytes=config.max_caption_bytes,
            allow_empty=config.allow_empty_captions,
        )

    def _context(self, row: np.void) -> np.ndarray:
        shape = tokens, channels = self._config.context_tokens, self._context_dim
        if self._index.format == "encoded":
            data, _ = self._part(row, "context", int(row["context_size"]))
            return parse_halves(data, "context", shape)
        data, stored = self._part(row, "context", MAX_HEADER_BYTES + 4 * tokens * channels)
        return parse_context(data, tokens, channels, stored)
