"""Image files: decoded and cropped to tensors, and written as PNG. Needs Pillow.

Shape letters: H and W rows and columns, pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from sd_perf.errors import DataError
from sd_perf.files import written_aside
from sd_perf.optional import optional


def load_image(path: str | Path | BinaryIO, size: int) -> torch.Tensor:
    """Load an image, by path or from a stream of its bytes, as (3, size, size) float32 in [0, 1].

    The shorter side is resized to `size` (bicubic, antialiased), then the centre is cropped. EXIF
    orientation is not applied. Raises DataError for an image that cannot be decoded, and
    ConfigError without Pillow.
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


def write_png(picture: torch.Tensor, path: Path) -> None:
    """Write a picture (3, H, W) in [0, 1] as a PNG of 8 bits per colour."""
    Image = optional("PIL.Image", "images need Pillow", "images")
    pixels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0)
    with written_aside(path) as draft:
        Image.fromarray(pixels.contiguous().numpy()).save(draft)
