"""Pictures of LAION's metadata, fetched into raw shards by img2dataset.

img2dataset is a program of its own here: its requirements (pandas < 3, webdataset < 0.3) cannot be
met beside this package's, so it gets a virtual environment that is made for it once. Options are
those of the benchmark. Reading what became of each picture needs pyarrow.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sd_perf.children import end_with_parent
from sd_perf.data.laion.metadata import find_metadata, open_parquet, pyarrow_modules
from sd_perf.errors import DataError, UserError
from sd_perf.files import disk_errors, is_absent, opened_untrusted, written_aside

VERSION = "1.47.0"
STATUS_NAME = "download_status.parquet"
"""what became of every picture: its columns are _STATUS_COLUMNS"""
_STATUS_COLUMNS = ("key", "status", "error_message", "url", "SAMPLE_ID", "LICENSE", "sha256")
_KEPT_COLUMNS = ("SAMPLE_ID", "LICENSE", "NSFW", "similarity", "WIDTH", "HEIGHT")
"""of the metadata, that the .json of a sample has, too"""
_STATS = re.compile(r"(\d+)_stats\.json")
"""written last for a shard: img2dataset passes over shards that have it"""
_MADE = "sd_perf_made"
"""file in an environment that is complete"""
_SECONDS_TO_END = 20
"""for img2dataset to end after SIGTERM, before it is killed"""


@dataclass(frozen=True)
class Download:
    """What became of the pictures of a folder of metadata."""

    rows: int
    """of the metadata"""
    tried: int
    """pictures in shards that are complete; fewer than rows where img2dataset gave shards up"""
    statuses: Counter[tuple[str, str]]
    """pictures by status (success, failed_to_download, failed_to_resize) and error"""


def default_environment() -> Path:
    """The folder of img2dataset's environment: in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "sd-perf" / f"img2dataset-{VERSION}"


def make_environment(folder: Path, tell: Callable[[str], None]) -> Path:
    """Make a virtual environment with img2dataset, where it is not there yet; returns the program.

    Raises UserError where it cannot be made, or the folder holds something else.
    """
    program = folder / "bin" / "img2dataset"
    if (folder / _MADE).is_file() and program.is_file():
        return program
    if folder.is_dir() and any(folder.iterdir()) and is_absent(folder / "pyvenv.cfg"):
        raise UserError(f"{folder}: holds other files; name a new folder for the environment")
    tell(f"installing img2dataset {VERSION} in {folder}, once: about 800 MB")
    with disk_errors(folder, "make room or name another folder with --environment"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        pip = (str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check")
        for command in (
            (sys.executable, "-m", "venv", "--clear", str(folder)),
            (*pip, "install", "--quiet", f"img2dataset=={VERSION}"),
        ):
            made = subprocess.run(command, env=_environment(), stderr=subprocess.PIPE, text=True)
            if made.returncode:
                lines = made.stderr.strip().splitlines() or ["without a word"]
                raise UserError(
                    f"{folder}: img2dataset cannot be installed ({lines[-1][:300]}); mend that and "
                    "run the command again"
                )
        (folder / _MADE).touch()
    return program


def download(
    metadata: Path, output: Path, program: Path, *, processes: int = 16, threads: int = 64
) -> Download:
    """Fetch the pictures of a folder of metadata into raw shards in `output`.

    Shards that are complete are kept, so a call that was stopped goes on. What became of each
    picture is written to STATUS_NAME beside the shards. Raises DataError for metadata that cannot
    be used, and UserError where img2dataset fails.
    """
    rows = sum(map(_count_rows, find_metadata(metadata)))
    with disk_errors(output, "make room or choose another folder", DataError):
        output.mkdir(parents=True, exist_ok=True)
    options = {
        "url_list": metadata.absolute(),
        "input_format": "parquet",
        "url_col": "URL",
        "caption_col": "TEXT",
        "output_format": "webdataset",
        "output_folder": output.absolute(),
        "processes_count": processes,
        "thread_count": threads,
        "incremental_mode": "incremental",
        "resize_mode": "no",
        "save_additional_columns": json.dumps(_KEPT_COLUMNS),
        "enable_wandb": False,
    }
    with _running([program, *(f"--{name}={value}" for name, value in options.items())]) as process:
        code = process.wait()
    if code:
        raise UserError(f"{program}: ended with exit code {code}; its own words stand above")
    return _gather(output, rows)


@contextlib.contextmanager
def _running(command: list[Any]) -> Iterator[subprocess.Popen[bytes]]:
    """A program that ends, with all that it has started, with the block at the latest."""
    process = subprocess.Popen(
        [str(word) for word in command],
        env=_environment(),
        start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the program
        preexec_fn=partial(end_with_parent, os.getpid()),
    )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS_TO_END)


def _environment() -> dict[str, str]:
    """Environment variables for another Python: none of this one's, and no look for updates."""
    ours = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return {**kept, "NO_ALBUMENTATIONS_UPDATE": "1"}


def _count_rows(path: Path) -> int:
    with opened_untrusted(path, "filter the metadata again", DataError) as file:
        return open_parquet(file, path).metadata.num_rows


def _gather(output: Path, rows: int) -> Download:
    """Put the tables that img2dataset wrote for its shards into one; count what is in it."""
    pa, parquet, _ = pyarrow_modules()
    statuses: Counter[tuple[str, str]] = Counter()
    schema = pa.schema([(name, pa.string()) for name in _STATUS_COLUMNS])
    path = output / STATUS_NAME
    with (
        disk_errors(path, "make room there", DataError),
        written_aside(path) as draft,
        parquet.ParquetWriter(draft, schema) as writer,
    ):
        for shard in _complete_shards(output):
            with opened_untrusted(shard, "remove this shard and download again", DataError) as file:
                table = open_parquet(file, shard, _STATUS_COLUMNS).read(list(_STATUS_COLUMNS))
            table = table.cast(schema)
            writer.write_table(table)
            for row in table.select(["status", "error_message"]).to_pylist():
                statuses[str(row["status"]), _kind_of_error(row["error_message"] or "")] += 1
    if statuses.total() > rows:
        raise DataError(
            f"{output}: holds shards of {statuses.total():,} pictures, and the metadata has "
            f"{rows:,} rows; write the pictures of other metadata to another folder"
        )
    return Download(rows, statuses.total(), statuses)


def _complete_shards(output: Path) -> list[Path]:
    """The tables of the shards that img2dataset has completed, by number."""
    matches = filter(None, (_STATS.fullmatch(path.name) for path in output.iterdir()))
    return sorted(output / f"{match[1]}.parquet" for match in matches)


def _kind_of_error(error: str) -> str:
    """An error's text without the numbers, hosts and addresses that make each of them unique."""
    kind = re.sub(r"hostname '[^']*'|\d{4,}|\(\d+ bytes.*", "...", error)
    return " ".join(kind.split())[:80]
