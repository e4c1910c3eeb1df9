"""Encodes captioned images into moments shards.

Shape letters: B images or captions, T text tokens, D context channels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from sd_perf.data.prepare.captioned_images import CaptionedImage, load_captioned_image
from sd_perf.data.shard_writer import ShardWriter
from sd_perf.errors import DataError
from sd_perf.models.vae import PIXELS_PER_LATENT

PixelRange = Literal["minus_one_one", "zero_one"]

_log = logging.getLogger(__name__)


def prepare_moments(
    samples: Sequence[CaptionedImage],
    encoder: Callable[[torch.Tensor], torch.Tensor],
    folder: str | Path,
    size: int,
    *,
    samples_per_shard: int = 1000,
    text_encoder: Callable[[list[str]], torch.Tensor] | None = None,
    pixel_range: PixelRange = "minus_one_one",
    captions_per_image: int = 1,
    batch_size: int = 8,
) -> int:
    """Encode images into moments shards in `folder`; returns the number of samples written.

    encoder: images (B, 3, size, size) float32 -> moments (B, 8, size/8, size/8), unscaled.
    size: rows and columns of the images, pixels.
    text_encoder: B captions -> text states (B, T, D), stored as float16; None stores none.
    pixel_range: range of the images given to the encoder. Autoencoders are trained on [-1, 1]; the
    benchmark's own shards were made from [0, 1].
    captions_per_image: each image becomes one sample per caption, for that many of its captions.
    batch_size: images per call of the encoder.

    Raises DataError for an image that cannot be decoded, naming its line, and for encoder output
    that has another shape or is not finite.
    """
    if size < PIXELS_PER_LATENT or size % PIXELS_PER_LATENT:
        raise DataError(
            f"image size {size} cannot be used; it must be a multiple of {PIXELS_PER_LATENT}"
        )
    if captions_per_image < 1:
        raise DataError(
            f"captions_per_image {captions_per_image} cannot be used; it must be at least 1"
        )
    with ShardWriter(folder, samples_per_shard) as writer:
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            images = torch.stack([load_captioned_image(sample, size) for sample in batch])
            if pixel_range == "minus_one_one":
                images = images * 2 - 1
            moments = encoder(images).float().cpu()
            side = size // PIXELS_PER_LATENT
            right = (len(batch), 8, side, side)
            _require_output(
                moments,
                right_shape=tuple(moments.shape) == right,
                what=f"encoder (want {right})",
                samples=batch,
            )
            for sample, values in zip(batch, moments.numpy(), strict=True):
                captions = list(sample.captions[:captions_per_image])
                _write(writer, sample, values, captions, text_encoder)
            _log.info("%d of %d images encoded", start + len(batch), len(samples))
        return writer.num_samples


def _write(
    writer: ShardWriter,
    sample: CaptionedImage,
    moments: np.ndarray,
    captions: list[str],
    text_encoder: Callable[[list[str]], torch.Tensor] | None,
) -> None:
    """Write one sample per caption of an image, with text states where there is a text encoder."""
    if text_encoder is None:
        for caption in captions:
            writer.write(moments, caption, sample.metadata)
        return
    context = text_encoder(captions).half().cpu()
    right = context.ndim == 3 and len(context) == len(captions)
    _require_output(
        context,
        right_shape=right,
        what=f"text encoder (want ({len(captions)}, tokens, channels))",
        samples=[sample],
    )
    for caption, states in zip(captions, context.numpy(), strict=True):
        writer.write(moments, caption, sample.metadata, states)


def _require_output(
    output: torch.Tensor, *, right_shape: bool, what: str, samples: Sequence[CaptionedImage]
) -> None:
    """DataError, naming the images, for an encoder's output of wrong shape or not finite."""
    where = samples[0].where + (f" to {samples[-1].where}" if len(samples) > 1 else "")
    if not right_shape:
        raise DataError(f"{where}: the {what} gives shape {tuple(output.shape)}")
    if not torch.isfinite(output).all():
        raise DataError(f"{where}: the {what} gives NaN or infinite values")
