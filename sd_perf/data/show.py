"""A few samples of a folder, as pictures with captions, for people to look at.

Shape letters: S latent side, P side of a picture, pixels.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sd_perf.config import Config
from sd_perf.data.laion.convert import RECORDS
from sd_perf.data.prepare.captioned_images import CaptionedImage, load_captioned_image
from sd_perf.data.prepare.image_folder import find_pictures, has_captions, read_images
from sd_perf.data.samples import SampleReader
from sd_perf.data.shards import ShardIndex, find_shards, scan_shard
from sd_perf.data.verify import find_format, fitted
from sd_perf.errors import DataError
from sd_perf.files import read_json
from sd_perf.models.vae import PIXELS_PER_LATENT
from sd_perf.optional import optional

_SPREAD = 3.0
"""latents from minus to plus this many standard deviations are black to white in false colours"""

Decoder = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Example:
    """A sample as it is shown."""

    name: str
    """key and shard, or file"""
    caption: str
    jpeg: bytes
    """the picture; empty where it cannot be shown"""
    remark: str
    """what the picture is: its size, or why there is none"""


def examples(
    folder: Path, config: Config, num: int, decoder: Decoder | None = None, has_preset: bool = False
) -> Iterator[Example]:
    """Up to `num` samples of a folder of shards or pictures, evenly spread over it.

    Of shards only as many are read as are shown. Moments become pictures by `decoder`, the
    function from unscaled latents (1, 4, S, S) to (1, 3, P, P) in [-1, 1]; without one, their first
    three channels are shown as red, green and blue. A sample that cannot be used is told in its
    remark. Raises DataError where there is nothing to show.
    """
    format = find_format(folder)
    if not format:
        yield from _pictures(folder, config, num)
        return
    config = config if has_preset else fitted(folder, format, config)
    shards = find_shards(folder, format)
    chosen = spread(shards, num)
    each = [len(part) for part in np.array_split(np.arange(num), len(chosen))]
    for path, count in zip(chosen, each, strict=True):
        try:
            index = ShardIndex(folder, [path.name], scan_shard(path, 0, format), format)
            # Pictures are shown as they are, not as an encoder gets them.
            data = dataclasses.replace(config.data, image_range="benchmark")
            reader = SampleReader(index, data, config.model.in_channels, config.model.context_dim)
        except DataError as error:
            yield Example(path.name, "", b"", str(error))
            continue
        image_range = _image_range(folder, config)
        for number in spread(range(len(index)), count):
            yield _example(index, reader, number, decoder, image_range)


def spread(items: Any, num: int) -> list[Any]:
    """Up to `num` of the items, evenly spread."""
    places = np.linspace(0, len(items) - 1, min(num, len(items))).round().astype(int)
    return [items[place] for place in places]


def _image_range(folder: Path, config: Config) -> str:
    """The range of the pixels that moments were made of, as `data convert` recorded it, or by the
    config."""
    record = read_json(folder / RECORDS / "settings.json")
    recorded = record.get("image_range") if isinstance(record, dict) else None
    return recorded or config.data.image_range


def _example(
    index: ShardIndex, reader: SampleReader, number: int, decoder: Decoder | None, image_range: str
) -> Example:
    name = index.name(number)
    try:
        sample = reader.read(number)
    except DataError as error:
        return Example(name, "", b"", str(error))
    if sample.pixels is not None:
        picture, remark = torch.from_numpy(sample.pixels), ""
    elif sample.moments is not None:
        mean = torch.from_numpy(sample.moments[: len(sample.moments) // 2].astype(np.float32))
        picture, remark = _seen(mean, decoder, image_range)
    side = "x".join(map(str, picture.shape[1:]))
    return Example(name, sample.caption, to_jpeg(picture), f"{side} pixels{remark}")


def _seen(
    mean: torch.Tensor, decoder: Decoder | None, image_range: str
) -> tuple[torch.Tensor, str]:
    """Latents (4, S, S) as a picture in about [0, 1], and what it is."""
    if decoder is None:
        colours = mean[:3] / mean[:3].std(dim=(1, 2), keepdim=True).clamp(min=1e-6)
        return colours / (2 * _SPREAD) + 0.5, ", latents in false colours"
    with torch.no_grad():
        decoded = decoder(mean[None])[0].float().cpu()
    # An encoder that got [0, 1] where it wants [-1, 1] makes its decoder give [0, 1].
    if image_range == "correct":
        return (decoded + 1) / 2, ", decoded"
    return decoded, ", decoded (encoded from [0, 1])"


def _pictures(folder: Path, config: Config, num: int) -> Iterator[Example]:
    """Pictures of a folder, with their captions where it has any."""
    size = PIXELS_PER_LATENT * config.data.latent_size
    images = (
        read_images(folder, allow_empty=True)
        if has_captions(folder)
        else [CaptionedImage(path, ("",), str(path)) for path in find_pictures(folder)]
    )
    if not images:
        raise DataError(f"{folder}: holds neither shards nor pictures; name another folder")
    for image in spread(images, num):
        name, caption = image.path.name, image.captions[0]
        try:
            picture = load_captioned_image(image, size)
        except DataError as error:
            yield Example(name, caption, b"", str(error))
            continue
        yield Example(name, caption, to_jpeg(picture), f"cut to {size}x{size} pixels")


def to_jpeg(picture: torch.Tensor) -> bytes:
    """A picture (3, P, P), cut off to [0, 1], as the bytes of a JPEG file."""
    Image = optional("PIL.Image", "images need Pillow", "images")
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    stream = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(stream, "JPEG", quality=90)
    return stream.getvalue()
