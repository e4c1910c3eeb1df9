"""Encodes captioned images into moments shards.

Shape letters: B images or captions, T text tokens, D context channels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from sd_perf.data.images import ImageRange, in_range
from sd_perf.data.prepare.captioned_images import CaptionedImage
from sd_perf.data.prepare.pictures import Picture, faults
from sd_perf.data.shard_writer import ShardWriter
from sd_perf.errors import DataError
from sd_perf.files import disk_errors, json_lines, write_text
from sd_perf.memory import require_memory
from sd_perf.models.vae import PIXELS_PER_LATENT

_log = logging.getLogger(__name__)

_NAMED = 1000
"""bad images that a sentence names, at most"""


def prepare_moments(
    pictures: Iterable[Picture],
    encoder: Callable[[torch.Tensor], torch.Tensor],
    folder: str | Path,
    size: int,
    *,
    samples_per_shard: int = 1000,
    text_encoder: Callable[[list[str]], torch.Tensor] | None = None,
    image_range: ImageRange = "correct",
    captions_per_image: int = 1,
    batch_size: int = 8,
    max_bad_samples: int = 0,
) -> int:
    """Encode pictures into moments shards in `folder`; returns the number of samples written.

    pictures: those of `read_pictures`, of `size` rows and columns.
    encoder: images (B, 3, size, size) float32 -> moments (B, 8, size/8, size/8), unscaled.
    text_encoder: B captions -> text states (B, T, D), stored as float16; None stores none.
    image_range: range of the images given to the encoder; see `sd_perf.data.images.ImageRange`.
    captions_per_image: each image becomes one sample per caption, for that many of its captions.
    batch_size: images per call of the encoder.
    max_bad_samples: pictures that cannot be used and may be left out. They and duplicates, of which
    any number is left out, are listed in `bad_images.jsonl` in `folder`, with what is wrong.

    Raises DataError where more pictures cannot be used, naming all of them, and for encoder output
    that has another shape or is not finite.
    """
    _require_options(size, captions_per_image, batch_size)
    left_out: list[Picture] = []
    pictures = iter(pictures)
    with ShardWriter(folder, samples_per_shard) as writer:
        while batch := _next_batch(pictures, batch_size, left_out, max_bad_samples):
            images = in_range(torch.stack([pixels for _, pixels in batch]), image_range)
            samples = [sample for sample, _ in batch]
            moments = encoder(images).float().cpu()
            side = size // PIXELS_PER_LATENT
            right = (len(batch), 8, side, side)
            _require_output(
                moments,
                right_shape=tuple(moments.shape) == right,
                what=f"encoder (want {right})",
                samples=samples,
            )
            captions = [list(sample.captions[:captions_per_image]) for sample in samples]
            encoded = zip(samples, moments.numpy(), captions, strict=True)
            captioned = [(*one, caption) for *one, own in encoded for caption in own]
            states = _text_states(text_encoder, captions, samples)
            for (sample, values, caption), context in zip(captioned, states, strict=True):
                writer.write(values, caption, sample.metadata, context)
        if left_out:
            _list_left_out(left_out, Path(folder))
        return writer.num_samples


def _next_batch(
    pictures: Iterator[Picture], batch_size: int, left_out: list[Picture], max_bad: int
) -> list[tuple[CaptionedImage, torch.Tensor]]:
    """The next usable pictures; others go to `left_out`. DataError past max_bad bad ones."""
    batch = []
    for picture in pictures:
        if picture.pixels is None:
            left_out.append(picture)
            if len(bad := faults(left_out)) > max_bad:
                bad += faults(pictures)  # nothing will be kept; find the other bad ones
                raise DataError(_too_many(bad, max_bad))
        else:
            batch.append((picture.sample, picture.pixels))
        if len(batch) == batch_size:
            break
    return batch


def _require_options(size: int, captions_per_image: int, batch_size: int) -> None:
    if size < PIXELS_PER_LATENT or size % PIXELS_PER_LATENT:
        raise DataError(
            f"image size {size} cannot be used; it must be a multiple of {PIXELS_PER_LATENT}"
        )
    if captions_per_image < 1:
        raise DataError(
            f"captions_per_image {captions_per_image} cannot be used; it must be at least 1"
        )
    require_memory(
        4 * 3 * size**2 * batch_size,
        torch.device("cpu"),
        f"encoding {batch_size} pictures of {size}x{size} pixels at a time",
        "make data.latent_size smaller",
    )


def _too_many(bad: list[str], allowed: int) -> str:
    images = "1 image" if len(bad) == 1 else f"{len(bad)} images"
    more = f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
    return (
        f"{images} cannot be used, more than data.max_bad_samples ({allowed}); mend them, "
        f"or allow as many: {'; '.join(bad[:_NAMED])}{more}"
    )


def _list_left_out(pictures: list[Picture], folder: Path) -> None:
    """Write the pictures that were left out to a file beside the shards, and warn."""
    path = folder / "bad_images.jsonl"
    with disk_errors(path, "make room there", DataError):
        write_text(path, json_lines({"error": picture.fault} for picture in pictures))
    _log.warning("%d images left out, listed in %s", len(pictures), path)


def _text_states(
    text_encoder: Callable[[list[str]], torch.Tensor] | None,
    captions: list[list[str]],
    samples: Sequence[CaptionedImage],
) -> Sequence[np.ndarray | None]:
    """The states (T, D) float16 of each sample's captions in turn; None without a text encoder."""
    together = [caption for own in captions for caption in own]
    if text_encoder is None:
        return [None] * len(together)
    context = text_encoder(together).half().cpu()
    _require_output(
        context,
        right_shape=context.ndim == 3 and len(context) == len(together),
        what=f"text encoder (want ({len(together)}, tokens, channels))",
        samples=samples,
    )
    return list(context.numpy())


def _require_output(
    output: torch.Tensor, *, right_shape: bool, what: str, samples: Sequence[CaptionedImage]
) -> None:
    """DataError, naming the images, for an encoder's output of wrong shape or not finite."""
    where = samples[0].where + (f" to {samples[-1].where}" if len(samples) > 1 else "")
    if not right_shape:
        raise DataError(f"{where}: the {what} gives shape {tuple(output.shape)}")
    if not torch.isfinite(output).all():
        raise DataError(f"{where}: the {what} gives NaN or infinite values")
