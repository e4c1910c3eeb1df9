"""LAION-400M's metadata: parquet files, of which the rows that name a licence are kept.

The columns are SAMPLE_ID, URL, TEXT, HEIGHT, WIDTH, LICENSE, NSFW and similarity. The benchmark's
pictures are those whose LICENSE is not "?". Needs pyarrow.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from sd_perf.errors import DataError
from sd_perf.files import (
    disk_errors,
    is_absent,
    misfit,
    one_line,
    opened_untrusted,
    parse_json,
    written_aside,
)
from sd_perf.optional import optional

UNKNOWN = "?"
"""LICENSE of a picture whose licence is not known"""
NO_ENTRY = "(no entry)"
"""stands for a null LICENSE among the counts; the benchmark keeps such rows"""
_COLUMNS = ("SAMPLE_ID", "URL", "TEXT", "LICENSE", "NSFW", "similarity", "WIDTH", "HEIGHT")
"""what the next step reads"""
_ROWS = 65_536
"""rows that are read at a time, and of a row group that is written"""
_RECORD = b"sd_perf_filter"
"""key in a filtered file's metadata: the size of its source, and how many rows each licence had"""
_SHAPE = {"source_bytes": int, "rows": {}}
_REMEDY = "fetch this file again"


def filter_metadata(
    source: Path, target: Path, progress: Callable[[int, int], None] = lambda done, of: None
) -> dict[str, Counter[str]]:
    """Write the rows of a folder's *.parquet files that name a licence to files of the same names.

    A file that is there already and was made from the same source is kept, so a run that was
    stopped goes on. `progress` is called with the files that are done, and of how many. Returns
    how many rows each licence has in each file, `UNKNOWN` among them. Raises DataError for a folder
    without such files, a file that cannot be read, and one that would be overwritten.
    """
    paths = find_metadata(source)
    with disk_errors(target, "make room or choose another folder", DataError):
        target.mkdir(parents=True, exist_ok=True)
    if source.samefile(target):
        raise DataError(f"{target}: is the folder that is read; write to another one")
    counts = {}
    for number, path in enumerate(paths):
        progress(number, len(paths))
        kept = _recorded_counts(target / path.name, path.stat().st_size)
        counts[path.name] = _filter_file(path, target / path.name) if kept is None else kept
    progress(len(paths), len(paths))
    return counts


def find_metadata(folder: Path) -> list[Path]:
    """The *.parquet files of a folder by name; DataError where there are none."""
    paths = sorted(path for path in folder.glob("*.parquet") if not path.name.startswith("."))
    if not paths:
        raise DataError(f"{folder}: holds no *.parquet files; name the folder of LAION's metadata")
    return paths


def _filter_file(source: Path, target: Path) -> Counter[str]:
    """Filter one file; returns the rows of each licence."""
    _, parquet, _ = pyarrow_modules()
    counts: Counter[str] = Counter()
    with opened_untrusted(source, _REMEDY, DataError) as stream:
        file = open_parquet(stream, source)
        with (
            disk_errors(target, "make room there", DataError),
            written_aside(target) as draft,
            parquet.ParquetWriter(draft, file.schema_arrow.remove_metadata()) as writer,
        ):
            for table in _row_groups(_known(file, source, counts)):
                writer.write_table(table)
            record = {"source_bytes": source.stat().st_size, "rows": counts}
            writer.add_key_value_metadata({_RECORD: json.dumps(record).encode()})
    return counts


def _known(file: Any, source: Path, counts: Counter[str]) -> Iterator[Any]:
    """Batches of the rows that name a licence; `counts` gets the rows of each licence."""
    _, _, compute = pyarrow_modules()
    for batch in _batches(file, source):
        licences = batch.column("LICENSE")
        with _damage_told(source):
            counts.update(_count(compute, licences))
            known = batch.filter(compute.fill_null(compute.not_equal(licences, UNKNOWN), True))
        yield known


def _row_groups(batches: Iterator[Any]) -> Iterator[Any]:
    """Tables of _ROWS rows or a little more, but for the last: few are left of each batch."""
    pa, _, _ = pyarrow_modules()
    waiting: list[Any] = []
    for batch in batches:
        waiting.append(batch)
        if sum(map(len, waiting)) >= _ROWS:
            yield pa.Table.from_batches(waiting)
            waiting = []
    if waiting:
        yield pa.Table.from_batches(waiting)


def pyarrow_modules() -> tuple[Any, Any, Any]:
    """pyarrow, pyarrow.parquet and pyarrow.compute; ConfigError without them."""
    need = "LAION's metadata needs pyarrow"
    names = ("pyarrow", "pyarrow.parquet", "pyarrow.compute")
    pa, parquet, compute = (optional(name, need, "datasets") for name in names)
    return pa, parquet, compute


def open_parquet(stream: BinaryIO, path: Path, columns: tuple[str, ...] = _COLUMNS) -> Any:
    """A pyarrow.parquet.ParquetFile that has these columns; DataError for any other file."""
    pa, parquet, _ = pyarrow_modules()
    try:
        file = parquet.ParquetFile(stream, pre_buffer=False)
        names = file.schema_arrow.names
    except (ValueError, OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: is no parquet file ({one_line(error)}); {_REMEDY}") from error
    missing = [name for name in columns if name not in names]
    if missing:
        raise DataError(
            f"{path}: has no column {' and no '.join(missing)}, which is needed; move it away"
        )
    if twice := [name for name in columns if names.count(name) > 1]:
        raise DataError(f"{path}: has the column {twice[0]} twice; move it away")
    return file


def _batches(file: Any, path: Path) -> Iterator[Any]:
    """The rows of a parquet file, some at a time; DataError where it is damaged."""
    batches = file.iter_batches(_ROWS)
    while True:
        with _damage_told(path):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


@contextmanager
def _damage_told(path: Path) -> Iterator[None]:
    """Turn an error of pyarrow in the block, such as of a LICENSE that is no text, into DataError.

    Not all of its errors are a ValueError or an OSError.
    """
    pa, _, _ = pyarrow_modules()
    try:
        yield
    except (ValueError, OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: is damaged ({one_line(error)}); {_REMEDY}") from error


def _count(compute: Any, licences: Any) -> dict[str, int]:
    counts = compute.value_counts(licences).to_pylist()
    return {
        NO_ENTRY if entry["values"] is None else str(entry["values"]): entry["counts"]
        for entry in counts
    }


def _recorded_counts(target: Path, source_bytes: int) -> Counter[str] | None:
    """The rows of each licence where `target` was made from a source of this size; None where there
    is no file.

    DataError for any other file: it may be one of the user's.
    """
    if is_absent(target):
        return None
    remedy = "move it away or write to another folder"
    with opened_untrusted(target, remedy, DataError) as stream:
        record = (open_parquet(stream, target).metadata.metadata or {}).get(_RECORD, b"{}")
    try:
        value = parse_json(record)
    except ValueError:
        value = None  # the sentence below says it
    is_ours = not misfit(value, _SHAPE) and not misfit([*value["rows"].values()], [int])
    if is_ours and value["source_bytes"] == source_bytes:
        return Counter(value["rows"])
    raise DataError(f"{target}: is there and was not made from the file of its name; {remedy}")
