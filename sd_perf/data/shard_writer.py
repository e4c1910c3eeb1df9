"""Writes samples as shards: tar files in the layout that `sd_perf.data.shards` describes."""

from __future__ import annotations

import io
import json
import tarfile
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import numpy as np

from sd_perf.data.digests import record_digests
from sd_perf.drafts import draft_folder
from sd_perf.errors import DataError
from sd_perf.files import disk_errors


def _npy_bytes(array: np.ndarray) -> bytes:
    """The array as the content of a .npy file."""
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)
    return stream.getvalue()


def start_shard(path: Path) -> tarfile.TarFile:
    """A new shard, open, for `add_sample`."""
    tar = tarfile.open(path, "w")  # noqa: SIM115 (closed by the caller)
    # a nameless directory entry first, as `tar` of a folder writes it in the benchmark's shards
    root = tarfile.TarInfo("")
    root.type, root.mode = tarfile.DIRTYPE, 0o755
    tar.addfile(root)
    return tar


def add_sample(tar: tarfile.TarFile, key: str, files: dict[str, bytes]) -> None:
    """Add a sample to a shard as its files, {extension: content}."""
    for extension in sorted(files):
        # TarInfo's defaults (no time, no owner) make equal samples equal bytes
        info = tarfile.TarInfo(f"{key}.{extension}")
        info.size = len(files[extension])
        tar.addfile(info, io.BytesIO(files[extension]))


def moments_bytes(moments: np.ndarray) -> bytes:
    """Moments (2C, H, W) as the content of a .npy file: float32 (1, 2C, H, W), as the benchmark's
    shards have them."""
    return _npy_bytes(np.asarray(moments, dtype="<f4")[None])


class ShardWriter:
    """Writes samples as shards `00000.tar`, `00001.tar`, ...; a context manager.

    Shards get their names only when the block ends without an exception, so a folder holds a whole
    set or none. Their digests are recorded beside them in SHA256SUMS. Equal samples give equal
    bytes. Raises DataError where the folder already has shards or cannot be written.
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
        self._drafts = ExitStack()
        with self._guard():
            self.folder.mkdir(parents=True, exist_ok=True)
        self._refuse_to_overwrite()

    def _refuse_to_overwrite(self) -> None:
        for shard in self.folder.glob("*.tar"):
            raise DataError(
                f"{shard} exists already; write to another folder, or move the old shards away"
            )

    def _guard(self) -> AbstractContextManager[None]:
        """Turns errors of the disk into one sentence."""
        return disk_errors(self.folder, "make room or choose another folder", DataError)

    def write(
        self,
        moments: np.ndarray,
        caption: str,
        metadata: dict[str, object] | None = None,
        context: np.ndarray | None = None,
    ) -> None:
        """Add a sample: moments (2C, H, W) and, optionally, context (T, D) float16 or float32."""
        files = {
            "json": json.dumps(metadata or {}, ensure_ascii=False).encode(),
            "npy": moments_bytes(moments),
            "txt": caption.encode(),
        }
        if context is not None:
            files["context.npy"] = _npy_bytes(context)
        self.write_files(files)

    def write_files(self, files: dict[str, bytes]) -> None:
        """Add a sample as its files, {extension: content}."""
        shard, place = divmod(self.num_samples, self.samples_per_shard)
        with self._guard():
            tar = self._start(shard) if self._tar is None or place == 0 else self._tar
            add_sample(tar, f"{shard:05d}{place:04d}", files)
        self.num_samples += 1

    def _start(self, shard: int) -> tarfile.TarFile:
        if self._tar is not None:
            self._tar.close()
        self._tar = start_shard(self._aside / f"{shard:05d}.tar")
        return self._tar

    def __enter__(self) -> ShardWriter:
        with self._guard():
            self._aside = self._drafts.enter_context(draft_folder(self.folder))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._guard(), self._drafts:
            if self._tar is not None:
                self._tar.close()
            if kind is None:
                self._refuse_to_overwrite()
                record_digests(self._aside, sorted(self._aside.iterdir()))
                for path in sorted(self._aside.iterdir()):
                    path.rename(self.folder / path.name)
