"""Raw shards to moments without the encoder: decode, resize, crop, tar; beside the reference's way.

    python -m benchmarks.conversion [--images DIR] [--pictures N] [--threads N] [--output FILE.json]

The rival does what the benchmark's own script does: it unpacks a shard to files, takes one picture
at a time (Pillow, resized as float by torch), saves an array for each and packs the folder again.
Both sides work on the same shard in turns; instead of an encoder a constant of the moments' size is
written. --images is a folder of JPEG files; without it noise of 640x480 pixels is drawn.
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from benchmarks.command import Report, run_command
from benchmarks.pairs import in_turns, pair_row
from sd_perf.data.laion.convert import RECORDS, Settings, convert_shard, read_samples
from sd_perf.data.shard_writer import add_sample, start_shard
from sd_perf.errors import UserError
from sd_perf.models.vae import PIXELS_PER_LATENT

NAME = "conversion"
BATCH = 8


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    add = parser.add_argument
    add("--images", type=Path, metavar="DIR", help="folder of *.jpg files (default: noise)")
    add("--pictures", type=int, default=150, metavar="N", help="of the shard (default: 150)")
    add("--pixels", type=int, default=512, metavar="N", help="side of a picture (default: 512)")
    add("--threads", type=int, default=2, metavar="N", help="that decode (default: 2)")
    add("--turns", type=int, default=5, metavar="N", help="of each side (default: 5)")


def write_shard(path: Path, options: argparse.Namespace) -> None:
    """A raw shard of the options' pictures, which are repeated as often as it takes."""
    if options.images:
        found = [file.read_bytes() for file in sorted(options.images.glob("*.jpg"))]
    else:
        found = [_noise(seed) for seed in range(8)]
    if not found:
        raise UserError(f"{options.images}: holds no *.jpg files; give another folder")
    with start_shard(path) as tar:
        for number in range(options.pictures):
            files = {"jpg": found[number % len(found)], "txt": b"a caption", "json": b"{}"}
            add_sample(tar, f"{number:09}", files)


def _noise(seed: int) -> bytes:
    rng, stream = np.random.default_rng(seed), io.BytesIO()
    small = Image.fromarray(rng.integers(0, 256, (60, 80, 3)).astype(np.uint8))
    small.resize((640, 480), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def moments_shape(options: argparse.Namespace) -> tuple[int, int, int]:
    """Shape of the moments of one picture."""
    side = options.pixels // PIXELS_PER_LATENT
    return 8, side, side


def reference_way(shard: Path, output: Path, options: argparse.Namespace) -> None:
    """Unpack, picture by picture, pack."""
    size, moments = options.pixels, np.zeros((1, *moments_shape(options)), np.float32)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        with tarfile.open(shard) as tar:
            tar.extractall(folder, filter="data")
        for path in Path(folder).glob("*.jpg"):
            image = np.array(Image.open(path).convert("RGB"))
            pixels = torch.from_numpy(image).permute(2, 0, 1).contiguous().float() / 255
            height, width = (side * size // min(image.shape[:2]) for side in image.shape[:2])
            resized = F.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)
            top, left = round((height - size) / 2), round((width - size) / 2)
            assert resized[..., top : top + size, left : left + size].shape[-1] == size
            np.save(path.with_suffix(".npy"), moments)
            path.unlink()
        with tarfile.open(output, "w") as tar:
            tar.add(folder, arcname="")


def own_way(shard: Path, output: Path, options: argparse.Namespace) -> None:
    """`data convert` of the shard with a constant in the encoder's place."""
    settings = Settings("", options.pixels, "benchmark")
    (output / RECORDS).mkdir(parents=True, exist_ok=True)
    shape = moments_shape(options)
    samples = read_samples(shard, settings, options.threads, ahead=2 * BATCH)
    convert_shard(
        shard, samples, output, lambda images: torch.zeros(len(images), *shape), settings, BATCH
    )


def measure(options: argparse.Namespace) -> int:
    """Time both sides; returns the exit code."""
    if options.tiny:
        options.pictures, options.pixels, options.turns = 9, 64, 1
    if min(options.pictures, options.pixels // PIXELS_PER_LATENT, options.threads) < 1:
        raise UserError("--pictures, --pixels, --threads: give 1 or more, and 8 pixels or more")
    if options.turns < 1:
        raise UserError("--turns: give 1 or more")
    report = Report(NAME, options, torch.device("cpu"), ("work",), ["pillow"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shard = folder / "00000.tar"
        write_shard(shard, options)
        sides = {
            "sd_perf": lambda: own_way(shard, folder / "own", options),
            "reference": lambda: reference_way(shard, folder / "reference.tar", options),
        }
        seconds = in_turns(sides, options.turns)
    work = f"{options.pictures} pictures to {options.pixels}x{options.pixels}, without the encoder"
    report.add(
        pair_row(
            work,
            seconds,
            "sd_perf",
            "reference",
            {"batch": BATCH, "dtype": "float32", "cached": "the shard in the page cache"},
            options.threads,
        )
    )
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit code."""
    return run_command(NAME, __doc__, add_options, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
