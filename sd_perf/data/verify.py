"""Reads data wholly, to find what training or `data prepare` would stumble over."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path

from sd_perf.children import worker_pool
from sd_perf.config import Config
from sd_perf.data.digests import digest
from sd_perf.data.laion.convert import RECORDS
from sd_perf.data.npz import MAX_HEADER_BYTES, read_npy_header
from sd_perf.data.prepare.captioned_images import CaptionedImage, load_captioned_image
from sd_perf.data.prepare.image_folder import read_images
from sd_perf.data.samples import SampleReader
from sd_perf.data.shards import ShardIndex, find_files, find_shards, scan_shard
from sd_perf.data.tar_files import group_by_key
from sd_perf.errors import DataError
from sd_perf.files import opened_untrusted, read_json
from sd_perf.models.vae import PIXELS_PER_LATENT

_COUNTS = ((RECORDS + "/{}.json", "samples"), ("{}_stats.json", "successes"))
"""files beside a shard that say how many samples it has, and where: of `data convert` and of
img2dataset"""
_SHARDS_PER_PROCESS = 4
"""shards to read per process: fewer are not worth the start of another process"""


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
    empty_captions: int = 0
    digests: dict[Path, str] = field(default_factory=dict)
    """SHA-256 of files, where it was asked for"""


def verify_shards(
    folder: Path, format: str, config: Config, *, with_digests: bool = False
) -> Iterator[Verdict]:
    """Read every sample of a folder's shards, which are of this data.format, as training with the
    config would; a verdict per shard, in order.

    Many shards are read by several processes. Indexes are neither read nor written. Raises
    DataError where there are no shards.
    """
    paths = find_shards(folder, format)
    work = partial(_verify_shard, format=format, config=config, with_digests=with_digests)
    processes = min(os.cpu_count() or 1, len(paths) // _SHARDS_PER_PROCESS)
    if processes > 1:
        with worker_pool(processes) as pool:
            yield from pool.map(work, paths)
    else:
        yield from map(work, paths)


def _verify_shard(path: Path, format: str, config: Config, with_digests: bool) -> Verdict:
    samples, empty, faults = 0, 0, []
    try:
        index = ShardIndex(path.parent, [path.name], scan_shard(path, 0, format), format)
        reader = SampleReader(
            index, config.data, config.model.in_channels, config.model.context_dim
        )
        samples = len(index)
        for number in range(samples):
            try:
                empty += not reader.read(number).caption.strip()
            except DataError as error:
                faults.append(f"{index.folder}: sample {index.name(number)}: {error}")
        faults += _miscounts(path, samples)
    except DataError as error:
        faults.append(str(error))
    digests = {path: digest(path)} if with_digests and path.is_file() else {}
    return Verdict(path, samples, faults, [path], empty, digests)


def _miscounts(path: Path, samples: int) -> Iterator[str]:
    """A sentence for each file beside a shard that says another number of samples."""
    for name, key in _COUNTS:
        record = path.parent / name.format(path.stem)
        value = read_json(record)
        said = value.get(key) if isinstance(value, dict) else None
        if said is not None and said != samples:
            yield f"{path}: holds {samples:,} samples, and {record.name} says {said!r}"


def find_format(folder: Path) -> str:
    """The data.format of a folder's shards by what is in the first that can be read; empty where
    there are none."""
    if not (paths := find_files(folder)):
        return "encoded" if find_files(folder, "*.safetensors") else ""
    for path in paths:
        try:
            held = {extension for files in group_by_key(path).values() for extension in files}
        except DataError:
            continue
        return "moments" if "npy" in held else "raw"
    return "moments"


def fitted(folder: Path, format: str, config: Config) -> Config:
    """The config with the latents' size that the first sample of a folder has, and taking empty
    captions: to verify shards that no preset was given for."""
    size = config.data.latent_size
    if format == "moments":
        size = next(filter(None, map(_latent_size, find_files(folder))), size)
    data = dataclasses.replace(config.data, latent_size=size, allow_empty_captions=True)
    return dataclasses.replace(config, data=data)


def _latent_size(path: Path) -> int:
    """The side of the first moments of a shard; 0 where they cannot be read."""
    try:
        offset, _ = next(files["npy"] for files in group_by_key(path).values() if "npy" in files)
        with opened_untrusted(path, "fetch it again", DataError) as file:
            file.seek(offset)
            shape, *_ = read_npy_header(file.read(MAX_HEADER_BYTES))
        return shape[-1]
    except (DataError, ValueError, StopIteration, IndexError):
        return 0  # the reader says what is wrong with it


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
        empty = sum(not caption.strip() for image in some for caption in image.captions)
        yield Verdict(path, len(some), faults, files, empty)


def _fault(image: CaptionedImage, size: int) -> str:
    """Why a picture cannot be decoded; empty where it can."""
    try:
        load_captioned_image(image, size)
    except DataError as error:
        return str(error)
    return ""
