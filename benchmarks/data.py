"""Loader rate: samples per second that reach the step, by format and loader, beside webdataset.

    python -m benchmarks.data [--format raw] [--shards DIR] [--threads 1 2] [--cold] [--output FILE]

Every side reads whole epochs of shuffled batches of the same samples, in turns: moments and
captions, and text states where --context precomputed asks for them; or pictures, decoded, resized
to 512 on float32 and cropped. Without --shards (or --images, a folder of .jpg) random ones of the
benchmark's size are written to a temporary folder. The rival is the webdataset library: in the
process and (--rival-workers) in the worker processes of torch's DataLoader, with Pillow and torch
for pictures. Encoded shards are ours alone: their rival reads the same samples as moments.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.command import Report, run_command
from benchmarks.data_rivals import RIVALS
from benchmarks.data_shards import write_shards
from benchmarks.pairs import in_turns
from sd_perf.config import DataConfig
from sd_perf.data.batch import LoaderOptions
from sd_perf.data.loaders.dali import DaliLoader
from sd_perf.data.loaders.portable import PortableLoader
from sd_perf.errors import UserError
from sd_perf.tools.results import Conditions, Status

NAME = "data"
SAMPLES, TINY_SAMPLES = 1024, 32
TINY_LATENTS = 8


class LoaderRow(Conditions):
    """One way to read the shards. None: not measured."""

    loader: str
    format: str
    """of the shards, as section `data` names it"""
    workers: int
    """threads that read and decode (of webdataset: worker processes; 0: in the process)"""
    samples_per_second: float | None
    """from the median seconds of an epoch"""
    samples_per_cpu_second: float | None
    """from the median CPU seconds of an epoch; None where other processes compute, too"""
    ratio: float | None
    """over webdataset's rate in the process, in the same run"""
    cpu_ratio: float | None
    """the same of CPU seconds, which other work on the machine changes less"""
    epochs: int | None
    status: Status
    reason: str | None


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    add = parser.add_argument
    add("--format", choices=tuple(RIVALS), default="moments", help="of the shards")
    add("--shards", type=Path, metavar="DIR", help="folder of shards (default: random ones)")
    add("--images", type=Path, metavar="DIR", help="folder of .jpg to make raw shards of")
    contexts = ("open_clip", "precomputed")
    add(
        "--context",
        choices=contexts,
        default="open_clip",
        help="captions alone, or text states too",
    )
    add(
        "--latent-size", type=int, default=64, metavar="N", help="side of the latents (default: 64)"
    )
    add("--batch", type=int, default=32, metavar="N", help="samples of a batch (default: 32)")
    add("--threads", type=int, nargs="+", default=[1, 2, 4], metavar="N", help="reading threads")
    workers = "worker processes of the rival; 0: in the process (default: 0 2)"
    add("--rival-workers", type=int, nargs="+", default=[0, 2], metavar="N", help=workers)
    add("--epochs", type=int, default=5, metavar="N", help="timed epochs of each side (default: 5)")
    add("--cold", action="store_true", help="drop the shards from the page cache before each epoch")


@contextmanager
def shards_of(options: argparse.Namespace) -> Iterator[tuple[Path, Path]]:
    """The folders that we and the rival read: of the options, or temporary ones."""
    if options.shards:
        yield options.shards, options.shards
        return
    samples = TINY_SAMPLES if options.tiny else SAMPLES
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours = write_shards(folder / "ours", options, samples)
        theirs = ours
        if options.format == "encoded":
            moments = argparse.Namespace(**{**vars(options), "format": "moments"})
            theirs = write_shards(folder / "theirs", moments, samples)
        yield ours, theirs


def own_side(
    folder: Path, options: argparse.Namespace, name: str, threads: int
) -> tuple[int, Callable[[], None]]:
    """Batches of an epoch, and a call that reads them by a loader of ours."""
    is_raw = options.format == "raw"
    config = DataConfig(
        format=options.format,
        path=str(folder),
        latent_size=options.latent_size,
        context=options.context,
        autoencoder="none is asked" if is_raw else "",
        image_range="benchmark",
        workers=threads,
        prefetch_batches=max(4, threads),
        allow_empty_captions=True,
    )
    sizes = LoaderOptions(seed=0, global_batch_size=options.batch, micro_batch_size=options.batch)
    loader = (DaliLoader if name == "dali" else PortableLoader)(config, sizes)
    batches = loader.num_samples // options.batch
    if batches == 0:
        raise UserError(f"{folder}: holds {loader.num_samples} samples; give a smaller --batch")

    def epoch() -> None:
        reading = loader.batches(0)
        for _ in range(batches):
            next(reading)
        reading.close()

    return batches, epoch


def drop_from_cache(folder: Path) -> None:
    """Have the system forget the content of the files of a folder (Linux)."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)  # what is not on the disk yet cannot be forgotten
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def sides_of(
    options: argparse.Namespace, ours: Path, theirs: Path
) -> tuple[int, dict[tuple[str, int], Callable[[], None] | None]]:
    """Batches of an epoch, and each side's call, None where its package is absent."""
    sides: dict[tuple[str, int], Callable[[], None] | None] = {}
    loaders = ["portable", *(["dali"] if options.format == "raw" else [])]
    for name in loaders:
        has = name != "dali" or importlib.util.find_spec("nvidia.dali") is not None
        for threads in options.threads:
            sides[name, threads] = None
            if has:
                batches, sides[name, threads] = own_side(ours, options, name, threads)
    has_rival = importlib.util.find_spec("webdataset") is not None
    for workers in options.rival_workers:
        sides["webdataset", workers] = None
        if has_rival:
            make = RIVALS[options.format]
            sides["webdataset", workers] = make(theirs, options, workers, batches)
    return batches, sides


def measure(options: argparse.Namespace) -> int:
    """Time every side; returns the exit code."""
    if options.tiny:
        options.latent_size, options.batch, options.epochs = TINY_LATENTS, 8, 1
        options.threads, options.rival_workers = options.threads[:1], [0]
    if min(options.batch, options.epochs, options.latent_size, *options.threads) < 1:
        raise UserError("--batch, --epochs, --latent-size, --threads: give 1 or more")
    torch.set_num_threads(1)
    packages = [
        "webdataset",
        *(["pillow", "nvidia-dali-cuda130"] if options.format == "raw" else []),
    ]
    report = Report(NAME, options, torch.device("cpu"), ("format", "loader", "workers"), packages)
    cpu: dict[str, list[float]] = {}

    def timed(name: str, side: Callable[[], None], folder: Path) -> Callable[[], None]:
        def epoch() -> None:
            start = time.process_time()
            side()
            cpu.setdefault(name, []).append(time.process_time() - start)
            if options.cold:
                drop_from_cache(folder)

        return epoch

    with shards_of(options) as (ours, theirs):
        batches, sides = sides_of(options, ours, theirs)
        epochs = {
            f"{name} {workers}": timed(
                f"{name} {workers}", side, theirs if name == "webdataset" else ours
            )
            for (name, workers), side in sides.items()
            if side is not None
        }
        wall = in_turns(epochs, options.epochs)
    medians = {
        name: (statistics.median(times), statistics.median(cpu[name][1:]))
        for name, times in wall.items()
    }
    for name, workers in sides:
        report.add(row_of(name, workers, medians, batches, options))
    return 0


def row_of(
    loader: str,
    workers: int,
    medians: dict[str, tuple[float, float]],
    batches: int,
    options: argparse.Namespace,
) -> LoaderRow:
    """A row from the median seconds and CPU seconds of an epoch by side."""
    own, rival = medians.get(f"{loader} {workers}"), medians.get("webdataset 0")
    alone = own and (loader != "webdataset" or workers == 0)
    samples = batches * options.batch
    cached = "nothing" if options.cold else "shards in the page cache"
    return {
        "batch": options.batch,
        "dtype": "float16" if options.format == "encoded" else "float32",
        "cached": cached,
        "loader": loader,
        "format": options.format + (", text states" if options.context == "precomputed" else ""),
        "workers": workers,
        "samples_per_second": samples / own[0] if own else None,
        "samples_per_cpu_second": samples / own[1] if own and alone else None,
        "ratio": rival[0] / own[0] if own and rival else None,
        "cpu_ratio": rival[1] / own[1] if own and rival and alone else None,
        "epochs": options.epochs if own else None,
        "status": "measured" if own else "absent",
        "reason": None if own else f"{loader} is not installed",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit code."""
    return run_command(NAME, __doc__, add_options, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
