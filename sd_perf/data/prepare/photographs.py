"""From a folder of captioned photographs to moments shards."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import torch

from sd_perf.data.samples import parse_caption
from sd_perf.data.shards import ShardWriter
from sd_perf.errors import BadSampleError, DataError
from sd_perf.optional import optional

MAX_CAPTION_BYTES = 4096
"""longest caption taken, bytes of UTF-8"""
FACTOR = 8
"""image pixels per latent pixel, along each side"""
_KEPT = ("file", "width", "height", "license", "flickr_url")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptionedImage:
    """One line of a captions file."""

    path: Path
    """the image, or the raw shard that holds it"""
    captions: tuple[str, ...]
    """one or more"""
    where: str
    """captions file and line, for messages"""
    metadata: dict[str, Any] = field(default_factory=dict)
    """file, width, height, license, flickr_url, as far as the line has them"""
    place: tuple[int, int] | None = None
    """byte offset and size of the image in a raw shard"""


def read_captioned_images(
    images_dir: str | Path, captions_file: str | Path = "", allow_empty: bool = False
) -> list[CaptionedImage]:
    """Images of a folder with their captions, in the order of the captions file.

    The file (default: captions.jsonl in the folder or beside it) has a JSON object per line:
    `file`, relative to the folder, and `captions`, a list, or `caption`. DataError, with file and
    line, for anything else, and for an empty caption unless allow_empty.
    """
    images_dir = Path(images_dir)
    if not images_dir.is_dir():
        raise DataError(f"{images_dir} is not a folder; name the folder of the images")
    path = Path(captions_file) if str(captions_file) else _find_captions(images_dir)
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); name the captions file"
        ) from error
    images = [
        _parse_line(line, images_dir, f"{path} line {number}", allow_empty)
        for number, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not images:
        raise DataError(f"{path} has no lines; it needs one JSON object per image")
    return images


def _find_captions(images_dir: Path) -> Path:
    for folder in (images_dir, images_dir.absolute().parent):
        if (folder / "captions.jsonl").is_file():
            return folder / "captions.jsonl"
    raise DataError(
        f"{images_dir} has no captions.jsonl in it or beside it; write one or name the captions "
        "file"
    )


def _parse_line(line: bytes, images_dir: Path, where: str, allow_empty: bool) -> CaptionedImage:
    try:
        entry = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8; save the captions file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} is not JSON ({error.msg}); write one JSON object per line"
        ) from error
    if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
        raise DataError(
            f"{where} does not name an image; it needs an object with `file` and `captions`"
        )
    captions = entry.get("captions", [entry["caption"]] if "caption" in entry else [])
    if not isinstance(captions, list) or not captions:
        raise DataError(
            f"{where} ({entry['file']}) has no captions; it needs a list `captions` or a string "
            "`caption`"
        )
    for caption in captions:
        _check_caption(caption, f"{where} ({entry['file']})", allow_empty)
    path = images_dir / entry["file"]
    if not path.is_file():
        raise DataError(f"{where} names {entry['file']}, which is not in {images_dir}")
    return CaptionedImage(
        path, tuple(captions), where, {name: entry[name] for name in _KEPT if name in entry}
    )


def _check_caption(caption: object, where: str, allow_empty: bool) -> None:
    if not isinstance(caption, str):
        raise DataError(f"{where}: caption {caption!r} is not a string")
    try:
        parse_caption(caption.encode("utf-8"), MAX_CAPTION_BYTES, allow_empty)
    except (
        UnicodeEncodeError
    ) as error:  # half of a surrogate pair, which JSON can say and UTF-8 cannot
        raise DataError(f"{where}: caption cannot be written as UTF-8") from error
    except BadSampleError as error:
        raise DataError(f"{where}: {error}") from error


def load_image(path: str | Path | BinaryIO, size: int) -> torch.Tensor:
    """An image, by path or as its bytes, as (3, size, size) float32 RGB in [0, 1]; DataError if it
    cannot be decoded.

    Shorter side resized to `size` (bicubic, antialiased), centre cropped; EXIF orientation is not
    applied.
    """
    Image = optional("PIL.Image", "images need Pillow", "images")
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        name = path if isinstance(path, str | Path) else "the image"
        raise DataError(
            f"{name} cannot be decoded as an image ({error}); mend or remove it"
        ) from error
    short = min(image.size)
    width, height = (side * size // short for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop(
        (left, top, left + size, top + size)
    )
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def prepare_moments(
    samples: Sequence[CaptionedImage],
    encoder: Callable[[torch.Tensor], torch.Tensor],
    folder: str | Path,
    size: int,
    samples_per_shard: int = 1000,
    text_encoder: Callable[[list[str]], torch.Tensor] | None = None,
    pixel_range: Literal["minus_one_one", "zero_one"] = "minus_one_one",
    captions_per_image: int = 1,
    batch_size: int = 8,
) -> int:
    """Encode images into moments shards in `folder`; returns the number of samples written.

    Each image gives a sample for each of its first `captions_per_image` captions. encoder: images
    (B, 3, size, size) float32 in the pixel range -> moments (B, 8, size/8, size/8), unscaled.
    text_encoder: B captions -> (B, T, D), kept as float16. The benchmark's own shards were made
    from zero_one; autoencoders are trained on minus_one_one. DataError for an image that cannot be
    decoded, with its line, and for output of another shape or not finite.
    """
    if size < FACTOR or size % FACTOR:
        raise DataError(f"image size {size} cannot be used; it must be a multiple of {FACTOR}")
    if captions_per_image < 1:
        raise DataError(
            f"captions_per_image {captions_per_image} cannot be used; it must be at least 1"
        )
    with ShardWriter(folder, samples_per_shard) as writer:
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            images = torch.stack([load_sample(sample, size) for sample in batch])
            moments = (
                encoder(images * 2 - 1 if pixel_range == "minus_one_one" else images).float().cpu()
            )
            right = (len(batch), 8, size // FACTOR, size // FACTOR)
            _require_output(
                moments, tuple(moments.shape) == right, f"encoder (want {right})", batch
            )
            for sample, values in zip(batch, moments.numpy(), strict=True):
                _write(
                    writer, sample, values, list(sample.captions[:captions_per_image]), text_encoder
                )
            _log.info("%d of %d images encoded", start + len(batch), len(samples))
        return writer.num_samples


def load_sample(sample: CaptionedImage, size: int) -> torch.Tensor:
    """`load_image` of a captioned image, from its file or its raw shard; the DataError says where
    it is named."""
    try:
        if sample.place is None:
            return load_image(sample.path, size)
        offset, length = sample.place
        with sample.path.open("rb") as shard:
            shard.seek(offset)
            return load_image(io.BytesIO(shard.read(length)), size)
    except DataError as error:
        raise DataError(f"{sample.where}: {error}") from error


def _write(
    writer: ShardWriter,
    sample: CaptionedImage,
    moments: np.ndarray,
    captions: list[str],
    text_encoder: Callable[[list[str]], torch.Tensor] | None,
) -> None:
    if text_encoder is None:
        for caption in captions:
            writer.write(moments, caption, sample.metadata)
        return
    context = text_encoder(captions).half().cpu()
    right = context.ndim == 3 and len(context) == len(captions)
    _require_output(
        context, right, f"text encoder (want ({len(captions)}, tokens, channels))", [sample]
    )
    for caption, states in zip(captions, context.numpy(), strict=True):
        writer.write(moments, caption, sample.metadata, states)


def _require_output(
    output: torch.Tensor, right_shape: bool, what: str, samples: Sequence[CaptionedImage]
) -> None:
    where = samples[0].where + (f" to {samples[-1].where}" if len(samples) > 1 else "")
    if not right_shape:
        raise DataError(f"{where}: the {what} gives shape {tuple(output.shape)}")
    if not torch.isfinite(output).all():
        raise DataError(f"{where}: the {what} gives NaN or infinite values")
