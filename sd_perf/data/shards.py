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
import itertools
import logging
import os
import re
import tarfile
from collections.abc import Collection, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from sd_perf.children import worker_pool
from sd_perf.data.encoded import require_whole, scan_encoded
from sd_perf.data.formats import FORMATS, IMAGE_EXTENSIONS, ShardFormat
from sd_perf.data.npz import read_npz
from sd_perf.data.tar_headers import Files, read_plain_headers
from sd_perf.errors import DataError
from sd_perf.files import disk_errors, is_absent, one_line, opened_untrusted, written_aside

INDEX_NAME = "sd_perf_index.npz"
_MEMBER = re.compile(rb"((?:.*/|)[^./]+)\.([^/]+)", re.DOTALL)
"""key and extension: as in webdataset, the key ends at the first dot of the base name. Hidden
files, such as the ._x that a Mac adds beside x, are no members of samples."""
_END_OF_ARCHIVE = bytes(1024)
"""a whole tar file ends with two blocks of 512 zero bytes"""
_LONG_HEADERS = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
"""headers that are followed by a name or by attributes, which tarfile reads into memory"""
_MAX_LONG_HEADER = 2**16
_BLOCK = 2**20
_ROWS = 1 << 14
"""rows that are checked at a time: they stay in the cache"""
_SHARDS_PER_PROCESS = 8
"""shards to scan per process: fewer are not worth the start of another process"""

_log = logging.getLogger(__name__)


class _BoundedTarInfo(tarfile.TarInfo):
    """A header of a tar file, which is refused where tarfile would read what it claims at once."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _BoundedTarInfo:
        info = super().frombuf(buf, encoding, errors)
        if info.size < 0 or (info.type in _LONG_HEADERS and info.size > _MAX_LONG_HEADER):
            raise tarfile.ReadError(f"a header claims {info.size} bytes")
        return info


def _list_files(path: Path) -> Files:
    """Regular files of a tar file.

    DataError where it is no tar file, not a whole one, or holds what would be left out: links,
    devices, and whatever stands behind its end.
    """
    remedy = "fetch or make this shard again"
    with opened_untrusted(path, remedy, DataError) as stream:
        files = read_plain_headers(stream.fileno())
        if files is not None:
            return files
        try:
            members, end = _read_headers(stream)
        except Exception as error:  # tarfile meets damage with nearly any error
            raise DataError(
                f"{path} cannot be read as a tar file ({one_line(error)}); {remedy}"
            ) from error
        # tarfile takes any header it cannot read for the end of the archive, without an error.
        # So a truncated or damaged tar shows only by what stands at that place.
        stream.seek(end)
        whole = stream.read(len(_END_OF_ARCHIVE)) == _END_OF_ARCHIVE
        padding = all(not any(block) for block in iter(lambda: stream.read(_BLOCK), b""))
    if not whole:
        raise DataError(f"{path} is truncated or damaged at byte {end}; {remedy}")
    if not padding:
        raise DataError(
            f"{path} goes on behind the end of the archive at byte {end}, as files put together "
            "with cat do; unpack all parts and make one shard of them"
        )
    for member in members:
        if not (member.isdir() or member.isreg()) or member.issparse():
            raise DataError(
                f"{path}: {member.name[:200]} is a link, a device or a sparse file, which is not "
                "read; make the shard again of plain files (tar --dereference --hard-dereference)"
            )
    regular = [member for member in members if member.isreg()]
    places = [(member.offset_data, member.size) for member in regular]
    names = [os.fsencode(member.name) for member in regular]
    return Files(names, np.array(places, np.int64).reshape(-1, 2))


def _read_headers(stream: BinaryIO) -> tuple[list[tarfile.TarInfo], int]:
    """The members of a tar file, and the byte at which the last one ends."""
    members = []
    with tarfile.open(fileobj=stream, mode="r:", tarinfo=_BoundedTarInfo) as tar:
        end = 0
        while (member := tar.next()) is not None:
            if member.size < 0 or tar.offset <= end:
                raise tarfile.ReadError(f"the header at byte {end} leads back")
            members.append(member)
            end = tar.offset
        return members, tar.offset


class _Members(NamedTuple):
    """The files of a shard that belong to samples."""

    keys: list[bytes]
    """of the samples, in the order of the tar"""
    extensions: list[str]
    """in lower case"""
    sample: np.ndarray
    """(files,) numbers of the keys"""
    extension: np.ndarray
    """(files,) numbers of the extensions"""
    places: np.ndarray
    """(files, 2) int64: byte offset and size"""

    def column(self, extension: str) -> np.ndarray:
        """(samples, 2) int64: byte offset and size of each sample's file; zeros: it has none."""
        column = np.zeros((len(self.keys), 2), np.int64)
        if extension in self.extensions:
            chosen = self.extension == self.extensions.index(extension)
            column[self.sample[chosen]] = self.places[chosen]
        return column


def _members(path: Path) -> _Members:
    """The files of a tar file by key and extension; DataError where two have the same."""
    files = _list_files(path)
    keys: list[bytes] = []
    ends: list[bytes] = []
    for name in files.names:
        # Most names have no folder, and are split in a third of the time that _MEMBER takes.
        key, _, end = name.partition(b".")
        if b"/" in name:
            match = _MEMBER.fullmatch(name)
            key, end = match.groups() if match else (b"", b"")
        keys.append(key)
        ends.append(end)
    is_member = np.array([bool(key and end) for key, end in zip(keys, ends, strict=True)], bool)
    places = files.places[is_member]
    if not is_member.all():
        keys, ends = (list(itertools.compress(each, is_member)) for each in (keys, ends))
    extension_of = {end: os.fsdecode(end).lower() for end in dict.fromkeys(ends)}
    extensions = list(dict.fromkeys(extension_of.values()))
    codes = {end: extensions.index(extension) for end, extension in extension_of.items()}
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    sample = np.array(list(map(numbers.__getitem__, keys)), np.int64)
    extension = np.array(list(map(codes.__getitem__, ends)), np.int64)
    _, first = np.unique(sample * len(extensions) + extension, return_index=True)
    if len(first) < len(keys):
        place = np.setdiff1d(np.arange(len(keys)), first)[0]
        raise DataError(
            f"{path}: {os.fsdecode(keys[place])}.{extension_of[ends[place]]} occurs twice; make "
            "the shard again with unique keys"
        )
    return _Members(list(numbers), extensions, sample, extension, places)


def group_by_key(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """The files of a shard as {key: {extension: (byte offset, size)}}, in the order of the tar."""
    members = _members(path)
    samples: dict[str, dict[str, tuple[int, int]]] = {os.fsdecode(key): {} for key in members.keys}
    groups = list(samples.values())
    numbers = members.sample.tolist(), members.extension.tolist(), members.places.tolist()
    for sample, extension, (offset, size) in zip(*numbers, strict=True):
        groups[sample][members.extensions[extension]] = (offset, size)
    return samples


def scan_shard(path: Path, number: int, format: str = "moments") -> np.ndarray:
    """Index rows of one shard, one per sample; see `ShardIndex.samples`. `number` is the shard's.

    Raises DataError where the shard cannot be used.
    """
    if format == "encoded":
        return scan_encoded(path, number)
    kind, members = FORMATS[format], _members(path)
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
