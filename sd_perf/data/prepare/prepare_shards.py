"""From a folder of captioned images to the shards that a config trains on."""

from __future__ import annotations

from pathlib import Path

import torch

from sd_perf.config import Config
from sd_perf.data.prepare.moments import prepare_moments
from sd_perf.data.prepare.raw_shards import read_images
from sd_perf.models.build import build_text_encoder
from sd_perf.models.readers import read_encoder
from sd_perf.models.vae import PIXELS_PER_LATENT


def prepare_shards(
    config: Config,
    images: Path,
    autoencoder: Path,
    *,
    captions: Path | None = None,
    captions_per_image: int = 1,
    samples_per_shard: int = 1000,
) -> tuple[int, int]:
    """Encode captioned images into shards of moments in data.path, as the config will read them.

    `images` and `captions` are those of `read_images`; `autoencoder` is the file of an encoder,
    which gets pixels of data.image_range. Images are resized to PIXELS_PER_LATENT *
    data.latent_size. Where data.context is precomputed, the shards also hold text states. Up to
    data.max_bad_samples images that cannot be decoded are left out and listed. Returns the number
    of samples written and the side of the images in pixels. Raises ConfigError where data.path is
    not set, and DataError for images or captions that cannot be used and for shards that exist
    already.
    """
    config.data.require(bool(config.data.path), "path", "the folder to write the shards to")
    right = "moments, the format that is written (`data encode` makes encoded shards of such)"
    config.data.require(config.data.format in ("moments", "synthetic"), "format", right)
    samples = read_images(images, captions, config.data.allow_empty_captions)
    text_encoder = None
    if config.data.context == "precomputed":
        text_encoder = build_text_encoder(config, torch.device("cpu"))
    pixels = PIXELS_PER_LATENT * config.data.latent_size
    count = prepare_moments(
        samples,
        read_encoder(autoencoder),
        config.data.path,
        pixels,
        samples_per_shard=samples_per_shard,
        text_encoder=text_encoder,
        image_range=config.data.image_range,
        captions_per_image=captions_per_image,
        max_bad_samples=config.data.max_bad_samples,
    )
    return count, pixels
