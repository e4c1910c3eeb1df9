"""Captioned images: where an image is, what is said of it, and what may be said."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from sd_perf.data.images import load_image
from sd_perf.data.samples import parse_caption
from sd_perf.errors import BadSampleError, DataError
from sd_perf.files import opened_untrusted, quoted

MAX_CAPTION_BYTES = 4096
"""longest caption that is accepted, bytes of UTF-8"""


@dataclass(frozen=True)
class CaptionedImage:
    """An image, not yet decoded, with its captions."""

    path: Path
    """the image file, or the raw shard that holds the image"""
    captions: tuple[str, ...]
    """one or more"""
    where: str
    """captions file and line, shard and key, or the image file; for error messages"""
    metadata: dict[str, Any] = field(default_factory=dict)
    """file, width, height, license, flickr_url, as far as they are known"""
    place: tuple[int, int] | None = None
    """byte offset and size of the image in a raw shard"""

    def said_of(self, error: object) -> str:
        """A sentence about the image, with the place where it is named."""
        return str(error) if self.where == str(self.path) else f"{self.where}: {error}"


def check_caption(caption: object, *, where: str, allow_empty: bool) -> None:
    """DataError for a caption that shards could not hold or a loader would refuse."""
    if not isinstance(caption, str):
        raise DataError(f"{where}: caption {quoted(caption)} is not a string")
    try:
        parse_caption(caption.encode("utf-8"), max_bytes=MAX_CAPTION_BYTES, allow_empty=allow_empty)
    except UnicodeEncodeError as error:  # JSON can hold half of a surrogate pair, UTF-8 cannot
        raise DataError(f"{where}: caption cannot be written as UTF-8") from error
    except BadSampleError as error:
        raise DataError(f"{where}: {error}") from error


@contextmanager
def opened_image(sample: CaptionedImage) -> Iterator[io.BufferedReader | io.BytesIO]:
    """The bytes of a captioned image, from its file or its raw shard, for a block."""
    with opened_untrusted(sample.path, "mend or remove it", DataError) as file:
        if sample.place is None:
            yield file
            return
        offset, length = sample.place
        file.seek(offset)
        yield io.BytesIO(file.read(length))


def load_captioned_image(
    sample: CaptionedImage, size: int, fit: Literal["crop", "squash"] = "crop"
) -> torch.Tensor:
    """`load_image` of a captioned image, from its file or its raw shard.

    Files are turned upright. Images of raw shards are not, since the benchmark's decoder does not.
    Raises DataError that says where the image is named.
    """
    try:
        if sample.place is None:
            return load_image(sample.path, size, fit=fit)
        with opened_image(sample) as file:
            return load_image(file, size, fit=fit, upright=False)
    except DataError as error:
        raise DataError(sample.said_of(error)) from error
