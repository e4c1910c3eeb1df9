"""The index of a data set of the benchmark's size: seconds to build it and to start with it.

    python -m benchmarks.data_index [--shards 832] [--samples 7828] [--extended] [--output FILE]

Shards have true headers and holes in place of moments; they are a few files under many names, so
that their headers lie in the page cache, as nothing else would fit there.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.command import Report, run_command
from sd_perf.data.order import epoch_order
from sd_perf.data.shards import INDEX_NAME, ShardIndex
from sd_perf.errors import UserError
from sd_perf.tools.results import Conditions, Status

NAME = "data_index"
_DISTINCT = 2
"""files behind the names of all shards"""


class IndexRow(Conditions):
    """One thing that is done before the first batch."""

    work: str
    shards: int
    samples: int
    """of all shards"""
    seconds: float
    cpu_seconds: float
    """of this process and its children"""
    megabytes: float | None
    """of the index, in memory as on the disk"""
    status: Status
    reason: str | None


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    add = parser.add_argument
    add("--shards", type=int, default=832, metavar="N", help="shards (default: 832)")
    add("--samples", type=int, default=7828, metavar="N", help="of each shard (default: 7828)")
    add("--processes", type=int, default=2, metavar="N", help="that scan (default: 2)")
    extended = "an extended header before each file, as programs in Python write them"
    add("--extended", action="store_true", help=extended)


def write_shard(path: Path, number: int, samples: int, extended: bool) -> None:
    """Write a shard of the benchmark's layout whose moments are a hole in the file."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.zeros((1, 8, 64, 64), np.float32))
    header, size = stream.getvalue()[:128], len(stream.getvalue())
    with path.open("wb") as file:

        def add(name: str, data: bytes, claimed: int) -> None:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = claimed, 1.25 if extended else 0
            file.write(info.tobuf(tarfile.PAX_FORMAT) + data)
            file.seek(-(-claimed // 512) * 512 - len(data), os.SEEK_CUR)

        for place in range(samples):
            key = f"{number:05d}{place:04d}"
            about = json.dumps({"url": f"http://example.org/{key * 5}", "key": key, "width": 512})
            caption = f"caption {key} ".encode() * 5
            add(f"{key}.json", about.encode(), len(about))
            add(f"{key}.npy", header, size)
            add(f"{key}.txt", caption, len(caption))
        file.write(bytes(1024))
        file.truncate()


def _spent() -> float:
    """CPU seconds of this process and of its children that have ended."""
    kinds = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    usages = [resource.getrusage(kind) for kind in kinds]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(options: argparse.Namespace) -> int:
    """Build, open and order; returns the exit code."""
    if options.tiny:
        options.shards, options.samples, options.processes = 4, 20, 1
    if min(options.shards, options.samples, options.processes) < 1:
        raise UserError("--shards, --samples, --processes: give 1 or more")
    report = Report(NAME, options, torch.device("cpu"), ("work",), [])
    with tempfile.TemporaryDirectory() as name:
        sources, folder = Path(name) / "sources", Path(name) / "shards"
        for each in (sources, folder):
            each.mkdir()
        for number in range(_DISTINCT):
            write_shard(sources / str(number), number, options.samples, options.extended)
        for number in range(options.shards):
            (folder / f"{number:05d}.tar").symlink_to(sources / str(number % _DISTINCT))
        works = {
            "build the index from headers": lambda: ShardIndex.open(
                folder, processes=options.processes
            ),
            "start with the index": lambda: ShardIndex.open(folder).fingerprint,
            "order an epoch": lambda: epoch_order(0, 0, options.shards * options.samples),
        }
        for work, call in works.items():
            start, cpu = time.perf_counter(), _spent()
            call()
            seconds, cpu_seconds = time.perf_counter() - start, _spent() - cpu
            is_index = work != "order an epoch"
            size = (folder / INDEX_NAME).stat().st_size / 1e6 if is_index else None
            report.add(row_of(work, options, seconds, cpu_seconds, size))
    return 0


def row_of(
    work: str, options: argparse.Namespace, seconds: float, cpu: float, megabytes: float | None
) -> IndexRow:
    """A measured row."""
    return {
        "batch": None,
        "dtype": "none",
        "cached": "headers of the shards, and the index, in the page cache",
        "work": work,
        "shards": options.shards,
        "samples": options.shards * options.samples,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "megabytes": megabytes,
        "status": "measured",
        "reason": None,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit code."""
    return run_command(NAME, __doc__, add_options, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
