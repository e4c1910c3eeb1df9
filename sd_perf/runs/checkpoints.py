"""Checkpoints of a run: writing them in a thread, finding and reading them.

A checkpoint is a folder `checkpoints/samples_<position>`. It holds `state.json` and, in the format
of torch.distributed.checkpoint, the tensors `model.<LDM key>`, `exp_avg.<LDM key>` and
`exp_avg_sq.<LDM key>`. It is written under another name and renamed when complete, so every folder
of that name is complete, at whatever moment the process dies.
"""

from __future__ import annotations

import json
import queue
import re
import shutil
import threading
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from sd_perf.errors import CheckpointError
from sd_perf.files import ASIDE, one_line, write_json, written_aside

MAKE_ROOM = "make room, then continue the run with --resume"
"""advice where a file of a run cannot be written"""
GO_BACK = "move this checkpoint away to go back to an older one"
"""advice where a checkpoint cannot be read"""
_NAME = re.compile(r"samples_(\d{10})")
# The library's own error is a BaseException, not an Exception.
_ERRORS = (Exception, CheckpointException)

# The library warns of saving and loading without a process group. It is intended here: rank 0 alone
# writes, and every rank reads for itself.
warnings.filterwarnings(
    "ignore", message="torch.distributed is disabled, unavailable or uninitialized"
)


class CheckpointStore:
    """The `checkpoints` folder of one run. Only the main rank writes.

    `keep` is how many checkpoints stay; None keeps all.
    """

    def __init__(self, folder: Path, keep: int | None = None) -> None:
        self.folder = folder
        self.keep = keep
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._saved: queue.SimpleQueue[Path] = queue.SimpleQueue()

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _NAME.fullmatch(path.name))

    def newest(self) -> Path | None:
        """The newest complete checkpoint."""
        return next(reversed(self.complete()), None)

    def newest_in_words(self) -> str:
        """Names the newest complete checkpoint, for error messages."""
        newest = self.newest()
        return (
            f"the newest complete checkpoint is {newest}"
            if newest
            else "there is no complete checkpoint yet"
        )

    def save(self, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> Path:
        """Copy the tensors to the host, then write them in a thread; returns the folder's path.

        Waits for the write before it; raises CheckpointError where that one failed.
        """
        self.wait()
        path = self.folder / f"samples_{state['samples']:010d}"
        # A copy, so that the optimizer may change the weights while the thread writes.
        host = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        self._thread = threading.Thread(
            target=self._write, args=(path, host, state), name="checkpoint writer"
        )
        self._thread.start()
        return path

    def wait(self) -> None:
        """Block until the write under way is done; raises CheckpointError where it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_failure()

    def raise_failure(self) -> None:
        """CheckpointError where the last write failed; does not block."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise CheckpointError(
                f"{self.folder}: a checkpoint could not be written ({_root_cause(failure)}); "
                f"{self.newest_in_words()}; {MAKE_ROOM}"
            )

    def take_saved(self) -> list[Path]:
        """Checkpoints that were completed since the last call, oldest first; does not block."""
        return [self._saved.get() for _ in range(self._saved.qsize())]

    def _write(self, path: Path, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(f"{ASIDE}*"):  # of a process killed while it wrote
                shutil.rmtree(leftover)
            # A resumed run may come to a saved position again; what it would write is the same.
            if path.exists():
                return
            with written_aside(path) as draft:
                dcp.save(
                    tensors,
                    storage_writer=dcp.FileSystemWriter(draft, single_file_per_rank=True),
                    no_dist=True,
                )
                write_json(draft / "state.json", state)
            self._saved.put(path)
            self._drop_old()
        except _ERRORS as error:  # handed to the training thread by raise_failure
            self._failure = error

    def _drop_old(self) -> None:
        """Delete all but the newest `keep` checkpoints."""
        for path in self.complete()[: -self.keep] if self.keep else []:
            # Renamed first: killed halfway, it leaves no checkpoint that looks complete.
            shutil.rmtree(path.rename(path.with_name(ASIDE + path.name)))


def read_state(path: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint folder; CheckpointError where it is missing or damaged."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a checkpoint of sd-perf (state.json: {one_line(error)}); {GO_BACK}"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(
            f"{path}: not a checkpoint of sd-perf (state.json holds no entries); {GO_BACK}"
        )
    return state


def load_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill tensors, {name: tensor}, in place from a checkpoint folder.

    Raises CheckpointError where the checkpoint lacks a name, has another shape, or is damaged.
    """
    metadata = _read_metadata(path)
    for name, tensor in tensors.items():
        stored = metadata.state_dict_metadata.get(name)
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointError(f"{path}: does not hold {name}; it was made by another model")
        if stored.size != tensor.shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(stored.size)} there and {tuple(tensor.shape)} "
                "in this model; "
                f"use the config the run was made with"
            )
    try:
        dcp.load(dict(tensors), storage_reader=dcp.FileSystemReader(path), no_dist=True)
    except _ERRORS as error:  # the library raises many kinds for damaged files
        raise CheckpointError(f"{path}: damaged ({_root_cause(error)}); {GO_BACK}") from error


def load_component(path: Path, component: str) -> dict[str, torch.Tensor]:
    """The tensors of a component ("model", "exp_avg" or "exp_avg_sq"), unprefixed, on the CPU.

    Raises CheckpointError where there are none, or the checkpoint is damaged.
    """
    stored = _read_metadata(path).state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in stored.items()
        if name.startswith(f"{component}.") and isinstance(entry, TensorStorageMetadata)
    }
    if not tensors:
        raise CheckpointError(f"{path}: holds no {component}")
    load_tensors(path, tensors)
    return {name.removeprefix(f"{component}."): tensor for name, tensor in tensors.items()}


def _read_metadata(path: Path) -> Metadata:
    """The checkpoint's table of contents, after a check that its files are long enough.

    So a truncated file is told by name and size, before any tensor is read.
    """
    read_state(path)
    try:
        metadata = dcp.FileSystemReader(path).read_metadata()
    except _ERRORS as error:  # a truncated pickle raises many kinds
        raise CheckpointError(
            f"{path}: damaged (.metadata: {_root_cause(error)}); {GO_BACK}"
        ) from error
    for entry in metadata.storage_data.values():
        file, needed = path / entry.relative_path, entry.offset + entry.length
        size = file.stat().st_size if file.is_file() else 0
        if size < needed:
            raise CheckpointError(
                f"{file}: truncated ({size} of at least {needed} bytes); {GO_BACK}"
            )
    return metadata


def _root_cause(error: BaseException) -> str:
    """The first error of a chain, that of the operating system or the library, on one line."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    first, cause = error, error.__cause__ or error.__context__
    while cause is not None:
        first, cause = cause, cause.__cause__ or cause.__context__
    return one_line(first)
