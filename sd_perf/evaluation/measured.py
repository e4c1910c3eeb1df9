"""What scoring needs of each picture, and where it is kept until a checkpoint has all of it.

A picture becomes its features and its cosine; the picture itself is dropped. 30,000 of the
benchmark take 246 MB. They are kept in files of some minutes' work each, so that an evaluation that
was killed draws only what is missing, on however many processes.

Shape letters: N pictures, D features, G pictures of the grid, H and W rows and columns.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sd_perf.errors import DataError
from sd_perf.files import disk_errors, misfit, one_line, parse_json, written_aside

GRID = 64
"""pictures in a grid, at most: those of the first prompts"""
KEEP_SECONDS = 120
"""work that a kill can cost"""
MAKE_ROOM = "make room, then evaluate again"
_TENSORS = {
    "indices": (torch.int64, 1),
    "features": (torch.float32, 2),
    "cosines": (torch.float32, 1),
    "grid": (torch.uint8, 4),
}
"""tensors of a file: their dtypes and numbers of dimensions"""


@dataclass(frozen=True, eq=False)
class Measured:
    """Pictures as scoring needs them."""

    indices: torch.Tensor
    """(N,) int64: their places among the prompts"""
    features: torch.Tensor
    """(N, D) float32"""
    cosines: torch.Tensor
    """(N,) float32, of each picture and its caption"""
    grid: torch.Tensor
    """(G, 3, H, W) uint8: those with an index below GRID"""
    seen: list[str]
    """the captions of what the judge saw, "" where it saw no scene; [] where nobody judged"""

    @classmethod
    def joined(cls, parts: Iterable[Measured]) -> Measured:
        """All pictures of the parts, in the order of the prompts."""
        parts = sorted(parts, key=lambda part: int(part.indices[0]))
        indices = torch.cat([part.indices for part in parts])
        order = indices.argsort()
        seen = [caption for part in parts for caption in part.seen]
        grid = torch.cat([part.grid for part in parts])
        in_grid = indices[indices < GRID].argsort()
        return cls(
            indices[order],
            torch.cat([part.features for part in parts])[order],
            torch.cat([part.cosines for part in parts])[order],
            grid[in_grid],
            [seen[place] for place in order.tolist()] if seen else [],
        )


class Keeper:
    """The measured pictures of one checkpoint, in a folder; files are added, never changed.

    `of` says what the pictures are of: files that say something else are left out and removed.
    """

    def __init__(self, folder: Path, of: str) -> None:
        self.folder, self._of = folder, of
        self._parts: list[Measured] = []
        self._since = time.monotonic()

    def add(self, part: Measured) -> None:
        """Take pictures that were measured; written when KEEP_SECONDS have passed."""
        self._parts.append(part)
        if time.monotonic() - self._since > KEEP_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what has been added since the last file."""
        if not self._parts:
            return
        from safetensors.torch import save_file

        part = Measured.joined(self._parts)
        # No other process draws the same picture, so the first index makes the name unique.
        path = self.folder / f"pictures_{int(part.indices[0]):08d}.safetensors"
        tensors = {name: getattr(part, name).contiguous() for name in sorted(_TENSORS)}
        said = {"of": self._of, "seen": json.dumps(part.seen), "sha256": _digest(tensors)}
        with disk_errors(path, MAKE_ROOM):
            self.folder.mkdir(parents=True, exist_ok=True)
            with written_aside(path) as draft:
                save_file(tensors, draft, said)
        self._parts, self._since = [], time.monotonic()

    def kept(self, tell: Callable[[str], None]) -> Measured | None:
        """All pictures in the files; None where there are none.

        A file that is damaged, or of other pictures, is removed and told: they are drawn again.
        """
        parts: list[Measured] = []
        have: set[int] = set()
        for path in sorted(self.folder.glob("pictures_*.safetensors")):
            try:
                part = _read(path, self._of)
                if have & set(part.indices.tolist()):
                    raise ValueError("it holds pictures that another file has, too")
            except (OSError, ValueError) as error:
                tell(f"{path}: is removed, and its pictures are drawn again: {one_line(error)}")
                with disk_errors(path, MAKE_ROOM):
                    path.unlink(missing_ok=True)
                continue
            parts.append(part)
            have |= set(part.indices.tolist())
        return Measured.joined(parts) if parts else None

    def complete(self, count: int, tell: Callable[[str], None]) -> Measured:
        """The pictures of all `count` prompts; DataError where one is missing."""
        measured = self.kept(tell)
        have = 0 if measured is None else len(measured.indices)
        if measured is None or have != count:
            raise DataError(
                f"{self.folder}: holds {have:,} of {count:,} pictures, though all were drawn; "
                "every process must see this folder: put the run on a file system that they share"
            )
        return measured

    def clear(self) -> None:
        """Remove the files and their folder."""
        with disk_errors(self.folder, MAKE_ROOM):
            for path in self.folder.glob("pictures_*.safetensors"):
                path.unlink()
            if self.folder.is_dir():
                self.folder.rmdir()


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of the tensors' bytes, by name."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, of: str) -> Measured:
    """The pictures in a file; ValueError where it is damaged or of something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            metadata: dict[str, Any] = file.metadata() or {}
            if metadata.get("of") != of:
                raise ValueError("it is of other weights, prompts or settings")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        seen = parse_json(metadata["seen"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"it is damaged ({one_line(error)})") from error
    kinds = {name: (value.dtype, value.ndim) for name, value in tensors.items()}
    fits = kinds == _TENSORS and not misfit(seen, [str])
    if fits:
        count = len(tensors["indices"])
        fits = (
            _digest(tensors) == metadata.get("sha256")
            and count > 0
            and len(tensors["features"]) == len(tensors["cosines"]) == count
            and len(tensors["grid"]) == int((tensors["indices"] < GRID).sum())
            and len(seen) in (0, count)
        )
    if not fits:
        raise ValueError("it is damaged (its tensors do not belong together)")
    return Measured(**tensors, seen=seen)
