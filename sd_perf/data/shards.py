"""Moments shards: tar files of `<key>.npy`, `<key>.txt`, `<key>.json` and, optionally,
`<key>.context.npy`.

The benchmark's shards are read as they are: a leading directory entry, then members in sorted
order. An index of byte offsets, built once per shard set, lets a loader read any sample without
walking the tar.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import tarfile
import zipfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from sd_perf.errors import DataError
from sd_perf.files import ASIDE, disk_errors, written_aside

INDEX_NAME = "sd_perf_index.npz"
_PARTS = {"npy": "moments", "txt": "caption", "context.npy": "context"}
_MEMBER = re.compile(r"((?:.*/|)[^.]+)\.([^/]+)")
_END_OF_ARCHIVE = bytes(1024)
_SHARDS_PER_PROCESS = 8
"""shards that make another process worth its start"""

_log = logging.getLogger(__name__)


def _row_type(key_bytes: int) -> np.dtype[Any]:
    fields: list[tuple[str, str]] = [("shard", "<i4")]
    for part in _PARTS.values():
        fields += [(f"{part}_offset", "<i8"), (f"{part}_size", "<i8")]
    return np.dtype([*fields, ("key", f"S{max(1, key_bytes)}")])


def _list_files(path: Path) -> list[tarfile.TarInfo]:
    try:
        with tarfile.open(path, "r:") as tar:
            members, end = tar.getmembers(), tar.offset
        with path.open("rb") as stream:
            # tarfile takes any header it cannot read for the end, so a cut or damaged tar shows
            # only here.
            stream.seek(end)
            whole = stream.read(len(_END_OF_ARCHIVE)) == _END_OF_ARCHIVE
    except (tarfile.TarError, OSError) as error:
        raise DataError(
            f"{path} cannot be read as a tar file ({error}); fetch or make this shard again"
        ) from error
    if not whole:
        raise DataError(
            f"{path} is truncated or damaged at byte {end}; fetch or make this shard again"
        )
    return [member for member in members if member.isreg()]


def group_by_key(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Key -> extension -> (byte offset, size) of a shard's files, in the order of the tar."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    for member in _list_files(path):
        if match := _MEMBER.fullmatch(member.name):
            key, extension = match[1], match[2].lower()
            files = samples.setdefault(key, {})
            if extension in files:
                raise DataError(
                    f"{path}: {key}.{extension} occurs twice; make the shard again with unique keys"
                )
            files[extension] = (member.offset_data, member.size)
    return samples


def scan_shard(path: Path, number: int) -> np.ndarray:
    """One row per sample of a tar file (see `ShardIndex.samples`); DataError where the shard cannot
    be used."""
    samples = group_by_key(path)
    rows: list[tuple[object, ...]] = []
    for key, files in samples.items():
        for extension in ("npy", "txt"):
            if extension not in files:
                raise DataError(
                    f"{path}: sample {key} has no .{extension}; every sample needs .npy and .txt"
                )
        places = (value for extension in _PARTS for value in files.get(extension, (0, 0)))
        rows.append((number, *places, os.fsencode(key)))
    return np.array(
        rows, dtype=_row_type(max((len(os.fsencode(key)) for key in samples), default=0))
    )


def _scan_all(paths: list[Path], processes: int | None) -> np.ndarray:
    if processes is None:
        processes = min(os.cpu_count() or 1, len(paths) // _SHARDS_PER_PROCESS)
    parts: list[np.ndarray] = []
    # spawn, because forking a process that may hold CUDA or threads is not safe
    with (
        ProcessPoolExecutor(processes, get_context("spawn"))
        if processes > 1
        else nullcontext() as pool
    ):
        for part in (pool.map if pool else map)(scan_shard, paths, range(len(paths))):
            parts.append(part)
            if len(parts) % 50 == 0:
                _log.info(
                    "indexing shards: %d of %d, %d samples",
                    len(parts),
                    len(paths),
                    sum(map(len, parts)),
                )
    return np.concatenate(parts)


@dataclass(eq=False)
class ShardIndex:
    """Where every sample of a shard set lies.

    `samples` is a structured array (N,): shard (number), moments_offset, moments_size,
    caption_offset, caption_size, context_offset, context_size (bytes within the shard; size 0 where
    a sample has no context) and key (UTF-8 bytes).
    """

    folder: Path
    shards: list[str]
    samples: np.ndarray

    @classmethod
    def open(
        cls,
        folder: str | Path,
        file: str | Path = "",
        *,
        need_context: bool = False,
        processes: int | None = None,
    ) -> ShardIndex:
        """The index of a folder's *.tar shards: the saved one where names, sizes and mtimes still
        match, else built.

        `file` keeps it (default: sd_perf_index.npz in the folder). Several ranks may call this at
        once, each would build; let one go first. Raises DataError for shards that cannot be used,
        an unwritable file, or, with `need_context`, a sample without .context.npy.
        """
        folder = Path(folder)
        paths = _find_shards(folder)
        file = Path(file) if str(file) else folder / INDEX_NAME
        state: dict[str, Any] = {
            "version": np.array(1),
            "names": np.array([path.name for path in paths]),
            "sizes": np.array([path.stat().st_size for path in paths], dtype=np.int64),
            "mtimes": np.array([path.stat().st_mtime_ns for path in paths], dtype=np.int64),
        }
        samples = _load_saved(file, state)
        if samples is None:
            remedy = "set data.index to a file in a folder you can write to"
            with disk_errors(file, remedy, DataError), written_aside(file) as draft:
                # within, so that an unwritable place is told before the scan
                samples = _scan_all(paths, processes)
                with draft.open("wb") as stream:  # numpy would append .npz to another name
                    np.savez(stream, samples=samples, **state)
            _log.info("indexed %d samples in %d shards: %s", len(samples), len(paths), file)
        index = cls(folder, [path.name for path in paths], samples)
        index._check(need_context)
        return index

    def _check(self, need_context: bool) -> None:
        if len(self) == 0:
            raise DataError(
                f"{self.folder}: the shards hold no samples; data.path must name moments shards"
            )
        missing = np.flatnonzero(self.samples["context_size"] == 0)
        if need_context and len(missing):
            raise DataError(
                f"{self.folder}: {len(missing)} samples have no .context.npy, the first is "
                f"{self.name(missing[0])}; "
                "make shards with text states or set data.context to open_clip"
            )

    def __len__(self) -> int:
        return len(self.samples)

    def name(self, sample: int) -> str:
        """Key and shard of a sample, for messages."""
        row = self.samples[sample]
        return f"{os.fsdecode(row['key'])} in {self.shards[row['shard']]}"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over shard names, keys and sizes: equal for equal shards wherever they
        lie."""
        digest = hashlib.sha256("\0".join(self.shards).encode())
        for column in ("shard", "key", *(f"{part}_size" for part in _PARTS.values())):
            digest.update(f"\0{self.samples.dtype[column].str}\0".encode())
            digest.update(self.samples[column].tobytes())
        return digest.hexdigest()


def _find_shards(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(
            f"{folder} is not a folder; data.path must name the folder of the *.tar moments shards"
        )
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        state = "holds no *.tar file" if any(folder.iterdir()) else "is empty"
        raise DataError(
            f"{folder} {state}; data.path must name the folder of the *.tar moments shards"
        )
    return paths


def _load_saved(file: Path, state: dict[str, Any]) -> np.ndarray | None:
    """Rows of a saved index, or None where there is none or the shards have changed since."""
    if not file.exists():
        return None
    try:
        with np.load(file, allow_pickle=False) as saved:
            same = all(np.array_equal(saved[name], value) for name, value in state.items())
            return saved["samples"] if same else None
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        # it may be a file of the user's, so it is not overwritten
        raise DataError(
            f"{file} is not a shard index; delete it or set data.index to another file"
        ) from error


def _npy_bytes(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)
    return stream.getvalue()


class ShardWriter:
    """Writes samples as moments shards `00000.tar`, ...; a context manager.

    Shards get their names only when the block ends well, so a folder holds a whole set or none.
    Equal samples give equal bytes. Raises DataError where the folder already has shards or cannot
    be written.
    """

    def __init__(self, folder: str | Path, samples_per_shard: int = 1000) -> None:
        if not 1 <= samples_per_shard <= 10_000:
            raise ValueError(
                f"samples_per_shard {samples_per_shard}: keys have four digits, so 1 to 10000"
            )
        self.folder = Path(folder)
        self.samples_per_shard = samples_per_shard
        self.num_samples = 0
        self._tar: tarfile.TarFile | None = None
        with self._guard():
            self.folder.mkdir(parents=True, exist_ok=True)
        self._refuse_to_overwrite()

    def _refuse_to_overwrite(self) -> None:
        for shard in self.folder.glob("*.tar"):
            raise DataError(
                f"{shard} exists already; write to another folder, or move the old shards away"
            )

    def _guard(self) -> AbstractContextManager[None]:
        return disk_errors(self.folder, "make room or choose another folder", DataError)

    def write(
        self,
        moments: np.ndarray,
        caption: str,
        metadata: dict[str, object] | None = None,
        context: np.ndarray | None = None,
    ) -> None:
        """Add a sample: moments (2C, H, W), stored as float32 (1, 2C, H, W); context (T, D) float16
        or float32."""
        files = {
            "json": json.dumps(metadata or {}, ensure_ascii=False).encode(),
            "npy": _npy_bytes(np.asarray(moments, dtype="<f4")[None]),
            "txt": caption.encode(),
        }
        if context is not None:
            files["context.npy"] = _npy_bytes(context)
        self.write_files(files)

    def write_files(self, files: dict[str, bytes]) -> None:
        """Add a sample as its files, by extension."""
        shard, place = divmod(self.num_samples, self.samples_per_shard)
        with self._guard():
            tar = self._start(shard) if self._tar is None or place == 0 else self._tar
            for extension in sorted(files):
                info = tarfile.TarInfo(f"{shard:05d}{place:04d}.{extension}")
                info.size = len(files[extension])
                tar.addfile(info, io.BytesIO(files[extension]))
        self.num_samples += 1

    def _start(self, shard: int) -> tarfile.TarFile:
        if self._tar is not None:
            self._tar.close()
        path = Path(self._aside.name) / f"{shard:05d}.tar"
        self._tar = tarfile.open(path, "w")  # noqa: SIM115 (closed by _start or __exit__)
        root = tarfile.TarInfo("")
        root.type, root.mode = tarfile.DIRTYPE, 0o755
        self._tar.addfile(root)
        return self._tar

    def __enter__(self) -> ShardWriter:
        with self._guard():
            self._aside = TemporaryDirectory(
                prefix=ASIDE, dir=self.folder, ignore_cleanup_errors=True
            )
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._guard(), self._aside as aside:
            if self._tar is not None:
                self._tar.close()
            if kind is None:
                self._refuse_to_overwrite()
                for path in sorted(Path(aside).iterdir()):
                    path.rename(self.folder / path.name)
