"""Image files: decoded and cropped to tensors, and written as PNG. Needs Pillow.

Shape letters: H and W rows and columns, pixels.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch

from sd_perf.errors import DataError
from sd_perf.files import one_line, opened_untrusted, written_aside
from sd_perf.optional import optional

if TYPE_CHECKING:
    import PIL.Image


MAX_PIXELS = 50_000_000
"""pixels of the largest image that is decoded"""
MAX_ASPECT = 32
"""longer side over shorter side, at most; the crop would show nearly nothing of a longer image"""
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""formats that are decoded; some others of Pillow's start programs"""


def load_image(path: str | Path | BinaryIO, size: int) -> torch.Tensor:
    """Load an image, by path or from a stream of its bytes, as (3, size, size) float32 in [0, 1].

    The shorter side is resized to `size` (bicubic, antialiased), then the centre is cropped. EXIF
    orientation is not applied. Raises DataError for an image that cannot be decoded, and
    ConfigError without Pillow.
    """
    try:
        if isinstance(path, str | Path):
            with opened_untrusted(Path(path), "mend or remove it", DataError) as file:
                image = decode_image(file).convert("RGB")
        else:
            image = decode_image(path).convert("RGB")
    except ValueError as error:
        name = path if isinstance(path, str | Path) else "the image"
        raise DataError(
            f"{name} cannot be decoded as an image ({error}); mend or remove it"
        ) from error
    Image = optional("PIL.Image", "images need Pillow", "images")
    short = min(image.size)
    width, height = (side * size // short for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop(
        (left, top, left + size, top + size)
    )
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def decode_image(file: BinaryIO) -> PIL.Image.Image:
    """The image in a file, in its own mode; its size is looked at before it is decoded.

    Raises ValueError, with the bare reason, for an image that cannot be decoded, or is larger than
    MAX_PIXELS or longer than MAX_ASPECT; and ConfigError without Pillow.
    """
    Image = optional("PIL.Image", "images need Pillow", "images")
    try:
        # Pillow warns of images beyond its own limit, which is above ours
        with warnings.catch_warnings(action="ignore"):
            image = Image.open(file, formats=_FORMATS)
        _require_size(*image.size)
        image.load()
    except Exception as error:  # damage shows as nearly any error
        raise ValueError(one_line(error)) from error
    return image


def _require_size(width: int, height: int) -> None:
    """ValueError for a size in pixels that is not decoded."""
    if width * height > MAX_PIXELS:
        raise ValueError(f"it has {width} x {height} pixels, more than {MAX_PIXELS:,}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ValueError(
            f"{width} x {height} pixels: one side is over {MAX_ASPECT} times the other"
        )


def write_png(picture: torch.Tensor, path: Path) -> None:
    """Write a picture (3, H, W) in [0, 1] as a PNG of 8 bits per colour."""
    Image = optional("PIL.Image", "images need Pillow", "images")
    pixels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0)
    with written_aside(path) as draft:
        Image.fromarray(pixels.contiguous().numpy()).save(draft)
