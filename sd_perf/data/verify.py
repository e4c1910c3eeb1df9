"""Reads data wholly, to find what training or `data prepare` would stumble over."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from sd_perf.config import Config
from sd_perf.data.prepare.captioned_images import CaptionedImage, load_captioned_image
from sd_perf.data.prepare.raw_shards import read_images
from sd_perf.data.samples import SampleReader
from sd_perf.data.shards import ShardIndex, find_shards, scan_shard
from sd_perf.errors import DataError
from sd_perf.models.vae import PIXELS_PER_LATENT


@dataclass(frozen=True)
class Verdict:
    """What was found in a shard, or in a folder of pictures."""

    path: Path
    samples: int
    """samples that were tried"""
    faults: list[str]
    """a sentence for each that cannot be used"""
    files: list[Path]
    """the files whose bytes were read"""


def verify_shards(config: Config) -> Iterator[Verdict]:
    """Read every sample of data.path's shards as training would; a verdict per shard.

    Indexes are neither read nor written. Raises ConfigError where data.path is not set, and
    DataError where it has no shards.
    """
    config.data.require(bool(config.data.path), "path", "the folder of the shards")
    format = config.data.format
    config.data.require(format != "synthetic", "format", "the format of the shards")
    for path in find_shards(Path(config.data.path), format):
        try:
            index = ShardIndex(path.parent, [path.name], scan_shard(path, 0, format), format)
            reader = SampleReader(
                index, config.data, config.model.in_channels, config.model.context_dim
            )
        except DataError as error:
            yield Verdict(path, 0, [str(error)], [path])
            continue
        yield Verdict(path, len(index), list(_bad_samples(index, reader)), [path])


def _bad_samples(index: ShardIndex, reader: SampleReader) -> Iterator[str]:
    for number in range(len(index)):
        try:
            reader.read(number)
        except DataError as error:
            yield f"{index.folder}: sample {index.name(number)}: {error}"


def verify_pictures(folder: Path, config: Config, captions: Path | None) -> Iterator[Verdict]:
    """Decode every picture that `data prepare` would take of a folder.

    A verdict per raw shard, or one for a folder of picture files. Raises DataError where captions
    or shards cannot be read.
    """
    images = read_images(folder, captions, config.data.allow_empty_captions)
    size = PIXELS_PER_LATENT * config.data.latent_size
    for path, group in groupby(images, lambda image: image.path if image.place else folder):
        some = list(group)
        faults = [fault for image in some if (fault := _fault(image, size))]
        files = list(dict.fromkeys(image.path for image in some))
        if path == folder and (folder / "captions.jsonl").is_file():
            files.append(folder / "captions.jsonl")
        yield Verdict(path, len(some), faults, files)


def _fault(image: CaptionedImage, size: int) -> str:
    """Why a picture cannot be decoded; empty where it can."""
    try:
        load_captioned_image(image, size)
    except DataError as error:
        return str(error)
    return ""
