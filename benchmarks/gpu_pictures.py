"""Does DALI on a GPU give the portable loader's pictures, and how many? A part of `gpu_acceptance`.

The pictures are made here. Needs DALI and Pillow beside torch and NumPy.
"""

from __future__ import annotations

import io
import itertools
import tempfile
import time
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.checks import Check, differing, make_check
from benchmarks.gpu_checks import PICTURES, Group
from benchmarks.gpu_device import Device
from sd_perf.config import DataConfig
from sd_perf.data.batch import Batch, LoaderOptions
from sd_perf.data.loaders.dali import DaliLoader
from sd_perf.data.loaders.portable import PortableLoader
from sd_perf.data.shard_writer import ShardWriter
from sd_perf.data.usage import usable_cores
from sd_perf.optional import optional

MEAN_BUDGET = 0.5
"""of 255: how far pixels of a picture may be off on average. Decoders round colours to bytes each
in its own way; a crop that is off by one pixel is several times as far"""
_SHAPES = ((480, 640), (640, 427), (512, 512), (768, 1023), (375, 500), (1200, 640))
"""rows and columns"""
_KINDS: tuple[tuple[int, str, dict[str, Any]], ...] = (
    (3, "JPEG", {"quality": 90}),
    (3, "JPEG", {"quality": 95, "subsampling": 0}),
    (3, "JPEG", {"quality": 80, "progressive": True}),
    (1, "JPEG", {"quality": 90}),
    (3, "PNG", {}),
    (4, "PNG", {}),
)
"""colours, format and its options; transparent ones go through the portable decoder"""
_BATCH = 6
_SECONDS = 4.0
"""for which each rate is measured"""


def require_packages() -> None:
    """ConfigError where DALI or Pillow is not installed."""
    optional("nvidia.dali", "DALI's pictures are compared", "dali")
    optional("PIL.Image", "pictures need Pillow", "images")


def groups(device: Device) -> list[Group]:
    """The checks, in the order of their worth."""
    sizes = device.name, device.full.latent_size
    return [
        Group("pixels", partial(check_pixels, *sizes), PICTURES),
        Group("hand-over", partial(check_hand_over, *sizes), PICTURES),
        Group("bad pictures", partial(check_bad_pictures, *sizes), PICTURES),
    ]


@contextmanager
def config_of(*bad: bytes, latent_size: int = 64) -> Iterator[DataConfig]:
    """A config that reads raw shards of pictures made here, `bad` ones among them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "shards"
        with ShardWriter(folder, samples_per_shard=64) as writer:
            for number, picture in enumerate([*bad, *_pictures(latent_size / 64)]):
                caption = f"caption {number}".encode()
                writer.write_files({"jpg": picture, "txt": caption, "json": b"{}"})
        yield DataConfig(
            format="raw",
            loader="dali",
            path=str(folder),
            latent_size=latent_size,
            autoencoder="none is asked",
            image_range="benchmark",
            max_bad_samples=len(bad),
        )


def _pictures(scale: float) -> Iterator[bytes]:
    """Image files of several shapes, colours and ways to encode them."""
    Image = optional("PIL.Image", "pictures need Pillow", "images")
    rng = np.random.default_rng(0)
    for (rows, columns), (colours, format, options) in itertools.product(_SHAPES, _KINDS):
        small = rng.integers(0, 256, (24, 32, colours), dtype=np.uint8).squeeze()
        size = round(columns * scale), round(rows * scale)
        stream = io.BytesIO()
        enlarged = Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)
        enlarged.save(stream, format, **options)
        yield stream.getvalue()


def check_pixels(device: str, latent_size: int) -> list[Check]:
    """Order, captions, place and pixels of DALI's batches beside the portable loader's."""
    with config_of(latent_size=latent_size) as plain:
        config = replace(plain, random_flip=True, random_crop=True)
        ours, theirs = (_epoch(kind, config, device) for kind in (DaliLoader, PortableLoader))
    pairs = list(zip(ours, theirs, strict=True))
    others = sum(
        mine.captions != other.captions or not mine.sample_indices.equal(other.sample_indices)
        for mine, other in pairs
    )
    away = sum(_pixels(batch).device.type != device for batch in ours)
    apart = torch.cat([(_pixels(a).cpu() - _pixels(b)).abs() * 255 for a, b in pairs])
    mean, worst = apart.flatten(1).mean(1).max().item(), apart.max().item()
    note = f"of 255, on average of the worst picture; its worst pixel is {worst:.1f} off"
    return [
        make_check("batches in another order", others, 0, recipe=PICTURES),
        make_check("batches elsewhere", away, 0, recipe=PICTURES),
        make_check("pixels", mean, MEAN_BUDGET, note=note, recipe=PICTURES),
    ]


def check_hand_over(device: str, latent_size: int) -> list[Check]:
    """Pixels that a stream with much to do reads late are still those of their batch."""
    with config_of(latent_size=latent_size) as config:
        plain = [_pixels(batch) for batch in _epoch(DaliLoader, config, device)]
        side = 8192 if device == "cuda" else 64
        matrix, late = torch.randn(side, side, device=device), []
        with closing(_stream(DaliLoader, config, device, _BATCH)) as stream:
            for _ in plain:
                torch.linalg.matrix_power(matrix, 16)  # keeps the device busy
                # The batch itself is given back at once, while the copy of it still waits.
                late.append(_pixels(next(stream)).clone())
    return [make_check("pixels read late", differing(late, plain), 0, recipe=PICTURES)]


def check_bad_pictures(device: str, latent_size: int) -> list[Check]:
    """Pictures that end early, or are none, are replaced as the portable loader replaces them."""
    whole, checks = next(_pictures(latent_size / 64)), []
    broken = {
        "that is cut in half": whole[: len(whole) // 2],
        "that is junk": b"\xff\xd8\xff" + bytes(500),
    }
    for what, picture in broken.items():
        with config_of(picture, latent_size=latent_size) as config:
            ours, theirs = (_epoch(kind, config, device) for kind in (DaliLoader, PortableLoader))
        pairs = zip(ours, theirs, strict=True)
        others = sum(mine.replacements != other.replacements for mine, other in pairs)
        checks.append(make_check(f"a picture {what}", others, 0, recipe=PICTURES))
    return checks


def measure_rates(device: Device) -> dict[str, float]:
    """Pictures per second by loader and threads."""
    rates, seconds = {}, min(_SECONDS, device.most_seconds)
    with config_of(latent_size=device.full.latent_size) as plain:
        for threads in (1, 2, 4, 8):
            if threads > usable_cores():
                break
            config = replace(plain, workers=threads, prefetch_batches=2 * threads)
            for name, kind in (("DALI", DaliLoader), ("portable", PortableLoader)):
                rates[f"{name}, {threads} threads"] = _rate(kind, config, device.name, seconds)
    return rates


def _rate(kind: type[PortableLoader], config: DataConfig, device: str, seconds: float) -> float:
    with closing(_stream(kind, config, device, batch=32)) as stream:
        for _ in range(config.prefetch_batches):  # pipelines are built, memory is taken
            next(stream)
        start, count, passed = time.perf_counter(), 0, 0.0
        while passed < seconds:
            count += len(next(stream).captions)
            passed = time.perf_counter() - start
    return round(count / passed, 1)


def _stream(
    kind: type[PortableLoader], config: DataConfig, device: str, batch: int
) -> Generator[Batch, None, None]:
    """Batches of a loader; DALI's are made on this device."""
    on = torch.device(device if kind is DaliLoader else "cpu")
    options = LoaderOptions(seed=0, global_batch_size=batch, micro_batch_size=batch, device=on)
    return kind(config, options).batches(0)


def _epoch(kind: type[PortableLoader], config: DataConfig, device: str) -> list[Batch]:
    with closing(_stream(kind, config, device, _BATCH)) as stream:
        return list(itertools.islice(stream, len(_SHAPES) * len(_KINDS) // _BATCH))


def _pixels(batch: Batch) -> torch.Tensor:
    if batch.pixels is None:
        raise ValueError("the batch holds no pictures")
    return batch.pixels
