"""Image files: decoded, resized and cropped to tensors, and written as PNG. Needs Pillow.

Shape letters: H and W rows and columns, pixels.
"""

from __future__ import annotations

import functools
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal

import numpy as np
import torch

from sd_perf.data.resize import AS_IT_IS, View, resize_and_crop
from sd_perf.errors import DataError
from sd_perf.files import one_line, opened_untrusted, written_aside
from sd_perf.optional import optional

try:
    import simplejpeg
except ImportError:
    simplejpeg = None

if TYPE_CHECKING:
    import PIL.Image


MAX_PIXELS = 50_000_000
"""pixels of the largest image that is decoded"""
MAX_ASPECT = 32
"""longer side over shorter side, at most; the crop would show nearly nothing of a longer image"""
ImageRange = Literal["benchmark", "correct"]
"""pixels that the autoencoder's encoder gets: [0, 1], which the benchmark's data were made from by
mistake and which its targets rest on, or [-1, 1], which autoencoders are trained on"""
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TIFF", "WEBP")
"""formats that are decoded, where Pillow was built with them; some others of its start programs"""
_ORIENTATION = 0x0112
"""tag of EXIF"""
_TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""orientation: what makes an image upright, as Pillow names it; 1 is upright"""
PICTURE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".j2k", ".jp2", ".jpeg", ".jpg", ".jxl"),
    *(".pgm", ".png", ".ppm", ".qoi", ".tif", ".tiff", ".webp"),
)
"""ends of the names of pictures, in lower case, also of some that are not decoded (HEIC, JPEG XL):
who has such shall be told so"""


def load_image(
    path: str | Path | BinaryIO,
    size: int,
    *,
    fit: Literal["crop", "squash"] = "crop",
    upright: bool = True,
    max_pixels: int | None = None,
    view: View = AS_IT_IS,
) -> torch.Tensor:
    """Load an image, by path or from a stream of its bytes, as (3, size, size) float32.

    fit="crop" is the transform of the benchmark's training images, in another `view` where one is
    given: see `resize_and_crop`. Values that the bicubic filter puts outside [0, 1] stay there.
    fit="squash" is that of the images behind the benchmark's FID statistics: Pillow's bicubic
    resize to the square, in 8 bits.

    `upright` turns the image as its EXIF orientation says; the benchmark's decoder does not.
    Images of more than `max_pixels` (None: MAX_PIXELS) are refused. Transparent ones are laid on
    white. Raises DataError for an image that cannot be decoded or has no defined range, and
    ConfigError without Pillow.
    """
    Image = optional("PIL.Image", "images need Pillow", "images")
    image = _decode(path, upright, max_pixels)
    if fit == "squash":
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return resize_and_crop(np.array(image), size, view)


def load_pixels(
    file: BinaryIO, name: str, *, upright: bool = True, background: str = "white"
) -> np.ndarray:
    """The pixels (H, W, 3) uint8 of an image as it is, from a stream of its bytes.

    Transparent ones are laid on `background`, a colour as Pillow's ImageColor names it. `upright`
    and the errors, which begin with `name`, are those of `load_image`.
    """
    return np.array(_decode_stream(file, name, upright, None, background))


def is_colour(name: str) -> bool:
    """Whether Pillow knows a colour, opaque, by this name or code (#rrggbb)."""
    ImageColor = optional("PIL.ImageColor", "images need Pillow", "images")
    try:
        return len(ImageColor.getrgb(name)) == 3
    except ValueError:
        return False


def load_picture(
    encoded: bytes,
    size: int,
    image_range: ImageRange,
    *,
    upright: bool = False,
    max_pixels: int | None = None,
    view: View = AS_IT_IS,
) -> torch.Tensor:
    """The pixels (3, size, size) float32 that the encoder gets, from the bytes of an image file.

    This is what every loader of raw shards must give, and what `data prepare` encodes. Images of
    raw shards are not turned as their EXIF orientation says, since the benchmark's decoder does not
    turn them. Raises DataError as `load_image` does.
    """
    pixels = None if upright else _quick_jpeg(encoded, max_pixels)
    if pixels is None:
        file = io.BytesIO(encoded)
        image = load_image(file, size, upright=upright, max_pixels=max_pixels, view=view)
    else:
        image = resize_and_crop(pixels, size, view)
    return in_range(image, image_range)


def _quick_jpeg(encoded: bytes, max_pixels: int | None = None) -> np.ndarray | None:
    """A JPEG's pixels (H, W, 3) uint8 by simplejpeg: Pillow's, in two thirds of the time.

    None where it is not installed, and for all else than a sound picture of usual colours: Pillow
    decodes that, or says what is wrong.
    """
    if simplejpeg is None or not encoded.startswith(b"\xff\xd8\xff"):
        return None
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(encoded)
        _require_size(width, height, max_pixels)
        if colours not in ("YCbCr", "Gray"):
            return None
        return simplejpeg.decode_jpeg(encoded, "RGB", fastdct=False, fastupsample=False)
    except ValueError:
        return None


def in_range(pixels: torch.Tensor, image_range: ImageRange) -> torch.Tensor:
    """Pixels in [0, 1], or a little outside as the bicubic filter leaves them, in this range."""
    return pixels if image_range == "benchmark" else pixels * 2 - 1


def _decode(path: str | Path | BinaryIO, upright: bool, max_pixels: int | None) -> Any:
    """An image file as a Pillow image of mode RGB; DataError where it cannot be one."""
    if isinstance(path, str | Path):
        with opened_untrusted(Path(path), "mend or remove it", DataError) as file:
            return _decode_stream(file, str(path), upright, max_pixels)
    return _decode_stream(path, "the image", upright, max_pixels)


def _decode_stream(
    file: BinaryIO, name: str, upright: bool, max_pixels: int | None, background: str = "white"
) -> Any:
    try:
        image = decode_image(file, max_pixels)
        format = image.format  # turning makes a copy without it
        turned = _turned(image) if upright else image
        return _to_rgb(turned, format or "", name, background)
    except ValueError as error:
        raise DataError(
            f"{name} cannot be decoded as an image ({one_line(error)}); mend or remove it"
        ) from error


def _turned(image: Any) -> Any:
    """A Pillow image turned as its EXIF orientation says; ValueError where that cannot be read.

    Pillow's ImageOps.exif_transpose also writes the EXIF data anew, and raises whatever a tag that
    a camera or an editor has damaged leads to.
    """
    Image = optional("PIL.Image", "images need Pillow", "images")
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception as error:  # damage shows as nearly any error
        raise ValueError(f"its EXIF data are damaged: {one_line(error)}") from error
    turn = _TURNS.get(orientation) if isinstance(orientation, int) else None
    return image.transpose(Image.Transpose[turn]) if turn else image


def _to_rgb(image: Any, format: str, name: str, background: str) -> Any:
    """A Pillow image of any mode in RGB: 16-bit grey scaled to 8 bits, transparency on a colour.

    Pillow's own conversion clips 16-bit and float grey at 255, and shows the colours that a
    transparent image hides.
    """
    Image = optional("PIL.Image", "images need Pillow", "images")
    transparent = image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info
    # Older versions of Pillow give 16-bit PNG files the mode of 32-bit integers.
    sixteen_bit = image.mode.startswith("I;16") or (image.mode, format) == ("I", "PNG")
    if sixteen_bit and not transparent:
        # 65535 is 257 * 255: this rounds, and takes half the memory of a float
        levels = (np.array(image).astype(np.uint32) + 128) // 257
        return Image.fromarray(levels.astype(np.uint8)).convert("RGB")
    if image.mode == "F" or image.mode.startswith("I"):
        raise DataError(
            f"{name} has pixels of mode {image.mode}, whose black and white are not defined; save "
            "it with 8 bits per colour"
        )
    if not transparent:
        return image if image.mode == "RGB" else image.convert("RGB")
    ground = Image.new("RGBA", image.size, background)
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


def decode_image(file: BinaryIO, max_pixels: int | None = None) -> PIL.Image.Image:
    """The image in a file, in its own mode; its size is looked at before it is decoded.

    Raises ValueError, with the bare reason, for an image that cannot be decoded, or is larger than
    `max_pixels` (None: MAX_PIXELS) or longer than MAX_ASPECT; and ConfigError without Pillow.
    """
    Image = optional("PIL.Image", "images need Pillow", "images")
    try:
        # Pillow warns of images beyond its own limit, which is above ours
        with warnings.catch_warnings(action="ignore"):
            image = Image.open(file, formats=_formats())
        width, height = image.size
        _require_size(width, height, max_pixels)
        image.load()
    except Exception as error:  # damage shows as nearly any error
        # Pillow names an object in memory after "cannot identify image file".
        raise ValueError(one_line(error).partition(" <_io")[0]) from error
    return image


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of _FORMATS that this Pillow knows."""
    Image = optional("PIL.Image", "images need Pillow", "images")
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def has_plain_pixels(file: BinaryIO) -> bool:
    """Whether an image's header promises what every decoder makes the same RGB pixels of.

    Those have 8 bits per colour, no palette and no transparency. Also False for a header that
    `decode_image` refuses.
    """
    Image = optional("PIL.Image", "images need Pillow", "images")
    try:
        with warnings.catch_warnings(action="ignore"):
            image = Image.open(file, formats=("BMP", "JPEG", "PNG", "PPM", "WEBP"))
        _require_size(*image.size)
    except Exception:  # damage shows as nearly any error; who decodes the image says which
        return False
    return image.mode in ("RGB", "L", "CMYK") and "transparency" not in image.info


def _require_size(width: int, height: int, max_pixels: int | None = None) -> None:
    """ValueError for a size in pixels that is not decoded."""
    most = MAX_PIXELS if max_pixels is None else max_pixels
    if width * height > most:
        raise ValueError(f"it has {width} x {height} pixels, more than {most:,}")
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
