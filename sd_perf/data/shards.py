"""Shards and their index.

A shard of moments or of pictures is a tar file. Each sample in it is `<key>.npy` (moments) or a
picture such as `<key>.jpg`, `<key>.txt` (caption), `<key>.json` (metadata, not read) and,
optionally beside moments, `<key>.context.npy` (text states). The benchmark's own shards have this
layout and are read as they are. Encoded shards: `sd_perf.data.encoded`.

The index holds the byte offsets of every sample. It is built once per shard set, and lets a loader
read any sample without walking the tar file.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Collection, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from sd_perf.children import worker_pool
from sd_perf.data.encoded import require_whole, scan_encoded
from sd_perf.data.formats import FORMATS, IMAGE_EXTENSIONS, ShardFormat
from sd_perf.data.npz import read_npz
from sd_perf.data.tar_files import list_members
from sd_perf.errors import DataError
from sd_perf.files import disk_errors, is_absent, opened_untrusted, written_aside

INDEX_NAME = "sd_perf_index.npz"
_ROWS = 1 << 14
"""rows that are checked at a time: they stay in the cache"""
_SHARDS_PER_PROCESS = 8
"""shards to scan per process: fewer are not worth the start of another process"""

_log = logging.getLogger(__name__)


def scan_shard(path: Path, number: int, format: str = "moments") -> np.ndarray:
    """Index rows of one shard, one per sample; see `ShardIndex.samples`. `number` is the shard's.

    Raises DataError where the shard cannot be used.
    """
    if format == "encoded":
        return scan_encoded(path, number)
    kind, members = FORMATS[format], list_members(path)
    rows = np.zeros(len(members.keys), dtype=kind.row_type(max(map(len, members.keys), default=0)))
    rows["shard"], rows["key"], lacking = number, members.keys, []
    for part, extensions in kind.parts.items():
        places = members.column(extensions[0])
        for other in extensions[1:]:
            places = np.where(places[:, :1] == 0, members.column(other), places)
        # No content stands at the beginning of a tar file.
        absent = np.flatnonzero(places[:, 0] == 0)
        if len(absent) and part not in kind.optional:
            lacking.append((int(absent[0]), part))
        rows[f"{part}_offset"], rows[f"{part}_size"] = places[:, 0], places[:, 1]
    for place, part in sorted(lacking)[:1]:
        files = [members.extensions[each] for each in members.extension[members.sample == place]]
        what = _lacking(part, files, kind)
        raise DataError(f"{path}: sample {os.fsdecode(members.keys[place])} has no {what}")
    # img2dataset writes samples as their downloads end. The benchmark's moments shards, made of the
    # same samples, have them in the order of keys.
    return np.sort(rows, order="key") if format == "raw" else rows


def _lacking(part: str, files: Collection[str], kind: ShardFormat) -> str:
    """What a sample of these files lacks, and what to do."""
    needed = [" or ".join(f".{name}" for name in kind.parts[part]) for part in (part, *kind.parts)]
    named = f"{needed[0]}; every sample needs {needed[1]} and .txt"
    other = "raw" if part == "moments" and set(files) & set(IMAGE_EXTENSIONS) else ""
    other = "moments" if part == "picture" and "npy" in files else other
    return f"{named} (such shards are read with data.format {other})" if other else named


def _scan_all(paths: list[Path], format: str, processes: int | None) -> np.ndarray:
    """Index rows of all shards; None processes: as many as are worth it."""
    if format == "encoded":
        require_whole(paths)
    if processes is None:
        processes = min(os.cpu_count() or 1, len(paths) // _SHARDS_PER_PROCESS)
    parts: list[np.ndarray] = []
    with worker_pool(processes) if processes > 1 else nullcontext() as pool:
        scanned = (pool.map if pool else map)(scan_shard, paths, range(len(paths)), repeat(format))
        for part in scanned:
            parts.append(part)
            done, samples = len(parts), sum(map(len, parts))
            if done % 50 == 0:
                _log.info("indexing shards: %d of %d, %d samples", done, len(paths), samples)
    return np.concatenate(parts)


@dataclass(eq=False)
class ShardIndex:
    """Where every sample of a shard set lies."""

    folder: Path
    shards: list[str]
    """file names, sorted"""
    samples: np.ndarray
    """structured array (N,). Fields: shard (number, int32); <part>_offset and <part>_size of every
    part that the format has: moments or picture, caption, context (bytes within the shard, int64;
    size 0 where a sample has no context); key (file-system bytes)"""
    format: str = "moments"
    """as `data.format` names it"""
    saved_fingerprint: str = ""
    """`fingerprint`, where the index was read from a file"""

    @classmethod
    def open(
        cls,
        folder: str | Path,
        file: str | Path = "",
        *,
        format: str = "moments",
        need_context: bool = False,
        processes: int | None = None,
    ) -> ShardIndex:
        """Open the index of a folder's shards, which are of this `data.format`.

        The index saved in `file` (default: sd_perf_index.npz in the folder) is used where names,
        sizes and modification times of the shards still match. Otherwise it is built and saved.
        Ranks that call this at once would each build it, so let one go first.

        Raises DataError for shards that cannot be used, for a `file` that cannot be written or is
        no index, and, with `need_context`, for a sample without text states.
        """
        folder = Path(folder)
        paths = find_shards(folder, format)
        file = Path(file) if str(file) else folder / INDEX_NAME
        stats = [_stat(path) for path in paths]
        state: dict[str, Any] = {
            "version": np.array(3),
            "format": np.array(format),
            "names": np.array([path.name for path in paths]),
            "sizes": np.array([stat.st_size for stat in stats], dtype=np.int64),
            "mtimes": np.array([stat.st_mtime_ns for stat in stats], dtype=np.int64),
        }
        if saved := _load_saved(file, state, FORMATS[format]):
            samples, fingerprint = saved
            index = cls(folder, [path.name for path in paths], samples, format, fingerprint)
        else:
            remedy = "set data.index to a file in a folder you can write to"
            with disk_errors(file, remedy, DataError), written_aside(file) as draft:
                # The scan is within written_aside, so that an unwritable place is told before it.
                samples = _scan_all(paths, format, processes)
                index = cls(folder, [path.name for path in paths], samples, format)
                state |= {"samples": samples, "fingerprint": np.array(index.fingerprint)}
                with draft.open("wb") as stream:  # numpy would append .npz to another name
                    np.savez(stream, **state)
            _log.info("indexed %d samples in %d shards: %s", len(samples), len(paths), file)
        index._check(need_context)
        return index

    def _check(self, need_context: bool) -> None:
        if len(self) == 0:
            raise DataError(
                f"{self.folder}: the shards hold no samples; data.path must name {self.format} "
                "shards"
            )
        if not need_context:
            return
        missing = np.flatnonzero(self.samples["context_size"] == 0)
        if len(missing):
            raise DataError(
                f"{self.folder}: {len(missing)} samples have no text states, the first is "
                f"{self.name(missing[0])}; "
                "make shards with text states or set data.context to open_clip"
            )

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, sample: int) -> str:
        """Key and shard of a sample, for error messages."""
        row = self.samples[sample]
        return f"{os.fsdecode(row['key'])} in {self.shards[row['shard']]}"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of shard names, keys and sizes: equal for equal shards, wherever they lie.

        Contents are not read: the benchmark has hundreds of gigabytes.
        """
        if self.saved_fingerprint:
            return self.saved_fingerprint
        digest = hashlib.sha256("\0".join(self.shards).encode())
        for column in ("shard", "key", *(f"{part}_size" for part in self._parts)):
            digest.update(f"\0{self.samples.dtype[column].str}\0".encode())
            digest.update(self.samples[column].tobytes())
        return digest.hexdigest()

    @cached_property
    def keys_fingerprint(self) -> str:
        """SHA-256 (hex) of the keys in order: equal for the same samples in another format."""
        keys = self.samples["key"]
        return hashlib.sha256(f"{keys.dtype.str}\0".encode() + keys.tobytes()).hexdigest()

    @property
    def _parts(self) -> Iterable[str]:
        return FORMATS[self.format].parts


def find_files(folder: Path, pattern: str = "*.tar") -> list[Path]:
    """The shards of a folder by name, without the ._*.tar that a Mac adds beside them."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("._"))


def find_shards(folder: Path, format: str = "moments") -> list[Path]:
    """The shards of a folder by name; DataError where there are none."""
    pattern = f"*{FORMATS[format].suffix}"
    advice = f"data.path must name the folder of the {pattern} {format} shards"
    try:
        names = [path.name for path in folder.iterdir()]
    except NotADirectoryError as error:
        raise DataError(f"{folder} is not a folder; {advice}") from error
    except OSError as error:
        reason = "is not a folder" if is_absent(folder) else f"cannot be read ({error.strerror})"
        raise DataError(f"{folder} {reason}; {advice}") from error
    paths = find_files(folder, pattern)
    if not paths:
        raise DataError(f"{folder} {f'holds no {pattern} file' if names else 'is empty'}; {advice}")
    return paths


def _stat(shard: Path) -> os.stat_result:
    """Size and time of a shard; DataError where the name leads nowhere."""
    try:
        return shard.stat()
    except OSError as error:
        raise DataError(
            f"{shard} cannot be read ({error.strerror}); fetch or make this shard again"
        ) from error


def _load_saved(
    file: Path, state: dict[str, Any], kind: ShardFormat
) -> tuple[np.ndarray, str] | None:
    """Rows and fingerprint of a saved index; None where there is none, or the shards changed since.

    DataError where the file is no index: it may be another file of the user's, so it is not
    overwritten.
    """
    if is_absent(file):
        return None
    remedy = "delete it or set data.index to another file"
    with opened_untrusted(file, remedy, DataError) as stream:
        try:
            saved = read_npz(stream)
            if not all(np.array_equal(saved[name], value) for name, value in state.items()):
                return None
            samples, fingerprint = saved["samples"], str(saved["fingerprint"])
            _check_rows(samples, state["sizes"], kind)
            if not re.fullmatch("[0-9a-f]{64}", fingerprint):
                raise ValueError("its fingerprint is none")
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(f"{file} is not a shard index; {remedy}") from error
    return samples, fingerprint


def _check_rows(rows: np.ndarray, sizes: np.ndarray, kind: ShardFormat) -> None:
    """ValueError for rows of another type, or that name bytes outside of the shards."""
    key_bytes = rows.dtype["key"].itemsize if rows.dtype.names else 1
    if rows.ndim != 1 or rows.dtype != kind.row_type(key_bytes):
        raise ValueError(f"its rows have dtype {rows.dtype}")
    for start in range(0, len(rows), _ROWS):
        some = rows[start : start + _ROWS]
        # As unsigned numbers, those below zero are larger than any shard.
        shard = some["shard"].view(np.uint32)
        if (shard >= len(sizes)).any():
            raise ValueError("a row names a shard that is not there")
        room = sizes[shard].view(np.uint64)
        for part in kind.parts:
            offset, size = (some[f"{part}_{what}"].view(np.uint64) for what in ("offset", "size"))
            if (offset > room).any() or (size > room - offset).any():
                raise ValueError(f"a row places its {part} outside of the shard")
