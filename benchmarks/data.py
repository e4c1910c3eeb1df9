"""Loader rate: samples per second that reach the step, by loader and threads, beside webdataset.

    python -m benchmarks.data [--shards DIR] [--threads 1 2 4] [--output FILE.json]

Every side reads whole epochs of shuffled batches of the same shards, in turns, from the page cache:
float32 moments and captions, and text states where --context precomputed asks for them. Without
--shards, random moments of the benchmark's size are written to a temporary folder. The rival is the
webdataset library, in the process and (--rival-workers) in the worker processes of torch's
DataLoader. Needs webdataset for the rival; its rows say so where it is absent.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.command import Report, run_command
from benchmarks.pairs import in_turns
from sd_perf.config import DataConfig
from sd_perf.data.batch import LoaderOptions
from sd_perf.data.loaders.portable import PortableLoader
from sd_perf.data.shard_writer import ShardWriter
from sd_perf.errors import UserError
from sd_perf.tools.results import Conditions, Status

NAME = "data"
SAMPLES, TINY_SAMPLES = 1024, 32
TINY_LATENTS = 8
CONTEXT = (77, 1024)
"""tokens and channels of the text states that are written"""


class LoaderRow(Conditions):
    """One way to read the shards. None: not measured."""

    loader: str
    format: str
    """of the shards, as section `data` names it"""
    workers: int
    """threads that read and decode (of webdataset: worker processes; 0: in the process)"""
    samples_per_second: float | None
    """from the median seconds of an epoch"""
    ratio: float | None
    """over webdataset's rate in the process, in the same run"""
    epochs: int | None
    status: Status
    reason: str | None


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    add = parser.add_argument
    add(
        "--shards", type=Path, metavar="DIR", help="folder of moments shards (default: random ones)"
    )
    context = ("open_clip", "precomputed")
    add(
        "--context", choices=context, default="open_clip", help="captions alone, or text states too"
    )
    add(
        "--latent-size", type=int, default=64, metavar="N", help="side of the latents (default: 64)"
    )
    add("--batch", type=int, default=32, metavar="N", help="samples of a batch (default: 32)")
    add("--threads", type=int, nargs="+", default=[1, 2, 4], metavar="N", help="reading threads")
    workers = "worker processes of the rival; 0: in the process (default: 0 2)"
    add("--rival-workers", type=int, nargs="+", default=[0, 2], metavar="N", help=workers)
    add("--epochs", type=int, default=5, metavar="N", help="timed epochs of each side (default: 5)")


@contextmanager
def shards_of(options: argparse.Namespace) -> Iterator[Path]:
    """The folder of the options, or a temporary one of random samples."""
    if options.shards:
        yield options.shards
        return
    rng, side = np.random.default_rng(0), options.latent_size
    samples = TINY_SAMPLES if options.tiny else SAMPLES
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "shards"
        with ShardWriter(folder, samples_per_shard=samples // 4) as writer:
            for sample in range(samples):
                moments = rng.standard_normal((8, side, side), dtype=np.float32)
                states = rng.standard_normal(CONTEXT, dtype=np.float32).astype(np.float16)
                context = states if options.context == "precomputed" else None
                writer.write(moments, f"caption {sample}", context=context)
        yield folder


def own_side(folder: Path, options: argparse.Namespace, threads: int) -> tuple[int, Any]:
    """Batches of an epoch, and a call that reads them by the portable loader."""
    config = DataConfig(
        path=str(folder),
        latent_size=options.latent_size,
        context=options.context,
        workers=threads,
        prefetch_batches=max(4, threads),
        allow_empty_captions=True,
    )
    sizes = LoaderOptions(seed=0, global_batch_size=options.batch, micro_batch_size=options.batch)
    loader = PortableLoader(config, sizes)
    batches = loader.num_samples // options.batch
    if batches == 0:
        raise UserError(f"{folder}: holds {loader.num_samples} samples; give a smaller --batch")

    def epoch() -> None:
        reading = loader.batches(0)
        for _ in range(batches):
            next(reading)
        reading.close()  # type: ignore[attr-defined]

    return batches, epoch


def rival_side(
    folder: Path, options: argparse.Namespace, workers: int, batches: int
) -> Callable[[], None]:
    """A call that reads an epoch of as many batches by webdataset."""
    import webdataset

    shards = sorted(str(path) for path in folder.glob("*.tar"))
    keys = ["npy", "txt", *(["context.npy"] if options.context == "precomputed" else [])]

    def collate(samples: list[tuple[Any, ...]]) -> list[Any]:
        moments, captions, *context = zip(*samples, strict=True)
        states = [torch.from_numpy(np.stack(each)).float() for each in context]
        return [torch.from_numpy(np.stack(moments))[:, 0], captions, *states]

    def epoch() -> None:
        dataset = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0, empty_check=False)
        samples = dataset.shuffle(1000).decode().to_tuple(*keys)
        read = samples.batched(options.batch, collation_fn=collate)
        loader = (
            webdataset.WebLoader(read, batch_size=None, num_workers=workers) if workers else read
        )
        count = sum(1 for _ in loader)
        assert count >= batches  # workers end with a batch each that is not full

    return epoch


def measure(options: argparse.Namespace) -> int:
    """Time every side; returns the exit code."""
    if options.tiny:
        options.latent_size, options.batch, options.epochs = TINY_LATENTS, 8, 1
        options.threads, options.rival_workers = options.threads[:1], [0]
    if min(options.batch, options.epochs, options.latent_size, *options.threads) < 1:
        raise UserError("--batch, --epochs, --latent-size, --threads: give 1 or more")
    report = Report(NAME, options, torch.device("cpu"), ("loader", "workers"), ["webdataset"])
    has_rival = importlib.util.find_spec("webdataset") is not None
    with shards_of(options) as folder:
        sides: dict[tuple[str, int], Callable[[], None]] = {}
        for threads in options.threads:
            batches, sides["sd_perf", threads] = own_side(folder, options, threads)
        rivals = [("webdataset", workers) for workers in options.rival_workers]
        for name, workers in rivals if has_rival else []:
            sides[name, workers] = rival_side(folder, options, workers, batches)
        names = {f"{name} {workers}": side for (name, workers), side in sides.items()}
        seconds = in_turns(names, options.epochs)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, workers in (*(side for side in sides if side[0] == "sd_perf"), *rivals):
        report.add(row_of(name, workers, medians, batches, options))
    return 0


def row_of(
    loader: str, workers: int, medians: dict[str, float], batches: int, options: argparse.Namespace
) -> LoaderRow:
    """A row from the median seconds of an epoch by side."""
    own, rival = medians.get(f"{loader} {workers}"), medians.get("webdataset 0")
    return {
        "batch": options.batch,
        "dtype": "float32",
        "cached": "shards in the page cache",
        "loader": loader,
        "format": "moments" + (", text states" if options.context == "precomputed" else ""),
        "workers": workers,
        "samples_per_second": batches * options.batch / own if own else None,
        "ratio": rival / own if own and rival else None,
        "epochs": options.epochs if own else None,
        "status": "measured" if own else "absent",
        "reason": None if own else "webdataset is not installed",
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit code."""
    return run_command(NAME, __doc__, add_options, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
