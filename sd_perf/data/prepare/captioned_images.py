"""Captioned images: a folder of pictures and a captions file."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from sd_perf.data.images import load_image
from sd_perf.data.samples import parse_caption
from sd_perf.errors import BadSampleError, DataError
from sd_perf.files import is_storable, one_line, parse_json, quoted, untrusted_lines

MAX_CAPTION_BYTES = 4096
"""longest caption that is accepted, bytes of UTF-8"""
_KEPT = ("file", "width", "height", "license", "flickr_url")
"""entries of a captions line that are kept as metadata of its samples"""


@dataclass(frozen=True)
class CaptionedImage:
    """An image, not yet decoded, with its captions."""

    path: Path
    """the image file, or the raw shard that holds the image"""
    captions: tuple[str, ...]
    """one or more"""
    where: str
    """captions file and line, or shard and key; for error messages"""
    metadata: dict[str, Any] = field(default_factory=dict)
    """file, width, height, license, flickr_url, as far as they are known"""
    place: tuple[int, int] | None = None
    """byte offset and size of the image in a raw shard"""


def read_captioned_images(
    images_dir: str | Path, captions_file: str | Path = "", allow_empty: bool = False
) -> list[CaptionedImage]:
    """Read the captions file of a folder of images; the result has the order of the file.

    The file (default: captions.jsonl in the folder or beside it) has one JSON object per line:
    `file`, a path relative to the folder, and either `captions`, a list, or `caption`. Raises
    DataError, with file and line, for anything else, and for an empty caption unless allow_empty.
    """
    images_dir = Path(images_dir)
    if not images_dir.is_dir():
        raise DataError(f"{images_dir} is not a folder; name the folder of the images")
    path = Path(captions_file) if str(captions_file) else _find_captions(images_dir)
    lines = untrusted_lines(path, remedy="name the captions file", kind=DataError)
    images = [
        _parse_line(line, images_dir, where=f"{path} line {number}", allow_empty=allow_empty)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not images:
        raise DataError(f"{path} has no lines; it needs one JSON object per image")
    return images


def _find_captions(images_dir: Path) -> Path:
    """captions.jsonl in the folder, else beside it."""
    for folder in (images_dir, images_dir.absolute().parent):
        if (folder / "captions.jsonl").is_file():
            return folder / "captions.jsonl"
    raise DataError(
        f"{images_dir} has no captions.jsonl in it or beside it; write one or name the captions "
        "file"
    )


def _parse_line(line: bytes, images_dir: Path, *, where: str, allow_empty: bool) -> CaptionedImage:
    """The image of one line; `where` names file and line."""
    try:
        entry = parse_json(line)
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8; save the captions file as UTF-8") from error
    except ValueError as error:
        raise DataError(
            f"{where} is not JSON ({one_line(error)}); write one JSON object per line"
        ) from error
    if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
        raise DataError(
            f"{where} does not name an image; it needs an object with `file` and `captions`"
        )
    name = entry["file"][:300]
    if reason := _reason_against(Path(entry["file"])):
        raise DataError(f"{where} names {name!r}, {reason}; name a picture of {images_dir}")
    captions = entry.get("captions", [entry["caption"]] if "caption" in entry else [])
    if not isinstance(captions, list) or not captions:
        raise DataError(
            f"{where} ({name}) has no captions; it needs a list `captions` or a string `caption`"
        )
    for caption in captions:
        _check_caption(caption, where=f"{where} ({name})", allow_empty=allow_empty)
    path = images_dir / entry["file"]
    if not path.is_file():
        raise DataError(f"{where} names {name}, which is not in {images_dir}")
    return CaptionedImage(
        path=path,
        captions=tuple(captions),
        where=where,
        metadata={name: entry[name] for name in _KEPT if name in entry},
    )


def _reason_against(file: Path) -> str:
    """Why a captions file may not name this picture; empty where it may."""
    if file.is_absolute() or ".." in file.parts:
        return "which lies outside of the folder"
    if file.name.startswith("._"):
        return "which a Mac wrote beside a picture and is none itself"
    if not is_storable(str(file)):
        return "which no disk can hold"
    return ""


def _check_caption(caption: object, *, where: str, allow_empty: bool) -> None:
    """DataError for a caption that shards could not hold or a loader would refuse."""
    if not isinstance(caption, str):
        raise DataError(f"{where}: caption {quoted(caption)} is not a string")
    try:
        parse_caption(caption.encode("utf-8"), max_bytes=MAX_CAPTION_BYTES, allow_empty=allow_empty)
    except UnicodeEncodeError as error:  # JSON can hold half of a surrogate pair, UTF-8 cannot
        raise DataError(f"{where}: caption cannot be written as UTF-8") from error
    except BadSampleError as error:
        raise DataError(f"{where}: {error}") from error


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
        offset, length = sample.place
        with sample.path.open("rb") as shard:
            shard.seek(offset)
            return load_image(io.BytesIO(shard.read(length)), size, fit=fit, upright=False)
    except DataError as error:
        raise DataError(f"{sample.where}: {error}") from error
