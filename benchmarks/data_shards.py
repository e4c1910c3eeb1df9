"""Shards of random samples for `benchmarks.data`."""

from __future__ import annotations

import argparse
import dataclasses
import io
from pathlib import Path

import numpy as np

from sd_perf.data.encoded import new_layout
from sd_perf.data.shard_writer import ShardWriter
from sd_perf.models.vae import PIXELS_PER_LATENT
from sd_perf.optional import optional

CONTEXT = (77, 1024)
"""tokens and channels of the text states that are written"""
_SHARDS = 4


def write_shards(folder: Path, options: argparse.Namespace, samples: int) -> Path:
    """Write shards of the options' format to a new folder; returns it."""
    if options.format == "encoded":
        _write_encoded(folder, options, samples)
        return folder
    with ShardWriter(folder, samples_per_shard=max(samples // _SHARDS, 1)) as writer:
        if options.format == "raw":
            for number, picture in enumerate(_pictures(options, samples)):
                caption = f"caption {number}".encode()
                writer.write_files({"jpg": picture, "txt": caption, "json": b"{}"})
            return folder
        rng, side = np.random.default_rng(0), options.latent_size
        for number in range(samples):
            moments = rng.standard_normal((8, side, side), dtype=np.float32)
            states = rng.standard_normal(CONTEXT, dtype=np.float32).astype(np.float16)
            context = states if options.context == "precomputed" else None
            writer.write(moments, f"caption {number}", context=context)
    return folder


def _pictures(options: argparse.Namespace, samples: int) -> list[bytes]:
    """JPEG files: those of --images over and over, or smooth random ones of 640 x 480 pixels."""
    number = max(samples // 4, 1)  # pictures cost a hundred times what moments do
    if options.images:
        files = sorted(options.images.glob("*.jpg"))
        some = [file.read_bytes() for file in files[:number]]
        return [some[place % len(some)] for place in range(number)]
    Image = optional("PIL.Image", "pictures need Pillow", "images")
    rng, pictures = np.random.default_rng(0), []
    scale = PIXELS_PER_LATENT * options.latent_size / 512
    size = round(640 * scale), round(480 * scale)
    for _ in range(number):
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        stream = io.BytesIO()
        small.resize(size, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        pictures.append(stream.getvalue())
    return pictures


def _write_encoded(folder: Path, options: argparse.Namespace, samples: int) -> None:
    folder.mkdir()
    rng, side, num = np.random.default_rng(0), options.latent_size, max(samples // _SHARDS, 1)
    context = (num, *CONTEXT) if options.context == "precomputed" else None
    keys = [f"{number:09d}".encode() for number in range(num)]
    captions = [f"caption {number}".encode() for number in range(num)]
    for shard in range(_SHARDS):
        plain = new_layout(keys, captions, (8, side, side), context)
        layout = dataclasses.replace(plain, shard=shard, shards=_SHARDS)
        known: dict[str, np.ndarray] = {
            "keys": np.array([list(key) for key in keys], np.uint8),
            "captions": np.frombuffer(b"".join(captions), np.uint8),
            "caption_ends": np.cumsum([len(caption) for caption in captions], dtype=np.int64),
            "states": np.arange(num),
        }
        arrays = {
            array.offset: known[name]
            if name in known
            else rng.standard_normal(array.shape, dtype=np.float32).astype(np.float16)
            for name, array in layout.arrays.items()
        }
        with (folder / f"{shard:05d}.safetensors").open("wb") as file:
            file.write(layout.header())
            for offset, values in arrays.items():
                file.seek(offset)
                file.write(values.tobytes())
