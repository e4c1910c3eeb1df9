"""Captioned images read: decoded by threads, framed, and each set of bytes taken once."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial

import torch

from sd_perf.data.images import load_pixels
from sd_perf.data.prepare.captioned_images import CaptionedImage, opened_image
from sd_perf.data.prepare.framing import Framing, FramingError
from sd_perf.data.threads import map_ahead
from sd_perf.errors import DataError

DUPLICATE = "duplicate"
"""kind of a picture whose bytes were read before"""
UNREADABLE = "unreadable"
"""kind of a picture that cannot be decoded"""


@dataclass(frozen=True)
class Picture:
    """A captioned image that was read, or why it cannot be used."""

    sample: CaptionedImage
    pixels: torch.Tensor | None
    """(3, size, size) float32 as `load_image` has them; None where it cannot be used"""
    digest: bytes = b""
    """SHA-256 of its file"""
    kind: str = ""
    """why it cannot be used, in short: UNREADABLE, DUPLICATE, or the kind of a FramingError"""
    fault: str = ""
    """the same in a sentence"""


def faults(pictures: Iterable[Picture]) -> list[str]:
    """What is wrong with those that cannot be used, but for duplicates."""
    return [picture.fault for picture in pictures if picture.kind not in ("", DUPLICATE)]


def read_pictures(
    samples: Sequence[CaptionedImage], framing: Framing, threads: int
) -> Generator[Picture, None, None]:
    """Read captioned images, in their order, by threads that work ahead of the caller.

    Of usable images in different files that have the same bytes the first is taken. An image that
    is named several times is read as often: it has several captions.
    """
    first: dict[bytes, CaptionedImage] = {}
    with closing(map_ahead(partial(_read, framing), enumerate(samples), threads)) as pictures:
        for picture in pictures:
            if picture.pixels is not None:
                picture = _taken_once(picture, first.setdefault(picture.digest, picture.sample))
            yield picture


def _taken_once(picture: Picture, first: CaptionedImage) -> Picture:
    """The picture, or its refusal where its bytes are those of an earlier file."""
    sample = picture.sample
    if (sample.path, sample.place) == (first.path, first.place):
        return picture
    earlier = first.path if first.place is None else first.where
    fault = sample.said_of(f"{_name(sample)} has the same bytes as {earlier}")
    return replace(picture, pixels=None, kind=DUPLICATE, fault=fault)


def _name(sample: CaptionedImage) -> str:
    """An image as a sentence calls it."""
    return str(sample.path) if sample.place is None else "the image"


def _read(framing: Framing, item: tuple[int, CaptionedImage]) -> Picture:
    number, sample = item
    is_file, name = sample.place is None, _name(sample)
    try:
        with opened_image(sample) as file:
            digest = hashlib.file_digest(file, "sha256").digest()
            file.seek(0)
            pixels = load_pixels(file, name, upright=is_file, background=framing.background)
        return Picture(sample, framing.apply(pixels, number), digest)
    except FramingError as error:
        fault = sample.said_of(f"{name} {error}")
        return Picture(sample, None, kind=error.kind, fault=fault)
    except DataError as error:
        return Picture(sample, None, kind=UNREADABLE, fault=sample.said_of(error))
