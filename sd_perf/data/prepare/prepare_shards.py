"""From a folder of captioned images to the shards that a config trains on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from sd_perf.config import Config
from sd_perf.data.images import is_colour
from sd_perf.data.prepare.framing import Crop, Framing, Small
from sd_perf.data.prepare.image_folder import ImageFolder, read_folder
from sd_perf.data.prepare.moments import prepare_moments
from sd_perf.data.prepare.pictures import Picture, faults, read_pictures
from sd_perf.data.show import Example, spread, to_jpeg
from sd_perf.errors import DataError
from sd_perf.models.build import build_text_encoder
from sd_perf.models.readers import read_encoder
from sd_perf.models.vae import PIXELS_PER_LATENT

_SHOWN = 32
"""pictures that are kept to be shown"""


@dataclass
class Survey:
    """What a folder holds and training will see; it grows as the pictures are read."""

    folder: ImageFolder
    framing: Framing
    read: int = 0
    left_out: list[Picture] = field(default_factory=list)
    """pictures that cannot be used"""
    examples: list[Example] = field(default_factory=list)
    """some of the pictures as training will see them, evenly spread"""

    @property
    def used(self) -> int:
        return self.read - len(self.left_out)

    @property
    def bad(self) -> list[str]:
        """What is wrong with pictures that cannot be used, but for duplicates."""
        return faults(self.left_out)

    def pictures(
        self, threads: int, progress: Callable[[int, int], None] = lambda done, of: None
    ) -> Iterator[Picture]:
        """Read the pictures, and note what is found."""
        images = self.folder.images
        shown = set(spread(range(len(images)), _SHOWN))
        for number, picture in enumerate(read_pictures(images, self.framing, threads)):
            self.read += 1
            if picture.pixels is None:
                self.left_out.append(picture)
            if number in shown:
                self.examples.append(_example(picture))
            progress(self.read, len(images))
            yield picture

    def lines(self) -> Iterator[str]:
        """The counts in words, a line each."""
        images, size = self.folder.images, self.framing.size
        captions = sum(len(image.captions) for image in images)
        yield f"{len(images):,} pictures with {captions:,} captions ({self.folder.source})"
        if uncaptioned := self.folder.uncaptioned:
            yield f"{len(uncaptioned):,} without a caption, left out (first: {uncaptioned[0]})"
        for kind, count in Counter(picture.kind for picture in self.left_out).items():
            first = next(picture.fault for picture in self.left_out if picture.kind == kind)
            yield f"{count:,} {kind}, left out (first: {first})"
        yield f"{self.used:,} to train on, of {size}x{size} pixels ({self.framing.crop} crop)"


def _example(picture: Picture) -> Example:
    """A picture as it is shown."""
    sample = picture.sample
    name, caption = str(sample.metadata.get("file", sample.path.name)), sample.captions[0]
    if picture.pixels is None:
        return Example(name, caption, b"", picture.fault)
    side = "x".join(map(str, picture.pixels.shape[1:]))
    return Example(name, caption, to_jpeg(picture.pixels), f"{side} pixels")


def survey_images(
    config: Config,
    images: Path,
    captions: Path | None = None,
    caption_column: str = "",
    *,
    crop: Crop = "center",
    small: Small = "refuse",
    background: str = "white",
) -> Survey:
    """The captioned images of a folder, found and not yet read.

    `captions` and `caption_column` are those of `read_folder`, the others those of Framing. Raises
    ConfigError where data.path is not set, and DataError for a folder that cannot be used.
    """
    config.data.require(bool(config.data.path), "path", "the folder to write the shards to")
    right = "moments, the format that is written (`data encode` makes encoded shards of such)"
    config.data.require(config.data.format in ("moments", "synthetic"), "format", right)
    if not is_colour(background):
        raise DataError(
            f"--background: {background[:100]!r} is no colour; name one such as white or #80ff00"
        )
    allow_empty = config.data.allow_empty_captions
    folder = read_folder(images, captions, column=caption_column, allow_empty=allow_empty)
    pixels = PIXELS_PER_LATENT * config.data.latent_size
    return Survey(folder, Framing(pixels, crop, small, background, config.training.seed or 0))


def prepare_shards(
    config: Config,
    survey: Survey,
    autoencoder: Path,
    captions_per_image: int = 1,
    samples_per_shard: int = 1000,
    *,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> int:
    """Encode captioned images into shards of moments in data.path, as the config will read them.

    `autoencoder` is the file of an encoder, which gets pixels of data.image_range. Where
    data.context is precomputed, the shards also hold text states. Up to data.max_bad_samples images
    that cannot be used are left out and listed. Returns the number of samples written. Raises
    DataError for more images that cannot be used, and for shards that exist already.
    """
    text_encoder = None
    if config.data.context == "precomputed":
        text_encoder = build_text_encoder(config, torch.device("cpu"))
    return prepare_moments(
        survey.pictures(config.data.workers, progress),
        read_encoder(autoencoder),
        config.data.path,
        survey.framing.size,
        samples_per_shard=samples_per_shard,
        text_encoder=text_encoder,
        image_range=config.data.image_range,
        captions_per_image=captions_per_image,
        max_bad_samples=config.data.max_bad_samples,
    )
