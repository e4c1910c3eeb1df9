"""Checkpoints of a run: writing them in a thread, finding and reading them.

A checkpoint is a folder `checkpoints/samples_<position>`; `sd_perf.runs.checkpoint_files` has its
format. It is written under another name and renamed when complete, so every folder of that name is
complete, at whatever moment the process dies.
"""

from __future__ import annotations

import queue
import shutil
import threading
from pathlib import Path
from typing import Any

import torch

from sd_perf.drafts import ASIDE
from sd_perf.errors import CheckpointError
from sd_perf.files import one_line, written_aside
from sd_perf.runs.checkpoint_files import (
    POSITION,
    read_state,
    read_tensors,
    write_shard,
    write_state,
)

MAKE_ROOM = "make room, then continue the run with --resume"
"""advice where a file of a run cannot be written"""


class CheckpointStore:
    """The `checkpoints` folder of one run. Only the main rank writes.

    `keep` is how many checkpoints stay; None keeps all.
    """

    def __init__(self, folder: Path, keep: int | None = None) -> None:
        self.folder = folder
        self.keep = keep
        self._thread: threading.Thread | None = None
        self._failure: Exception | None = None
        self._saved: queue.SimpleQueue[Path] = queue.SimpleQueue()

    def complete(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if POSITION.fullmatch(path.name))

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
        host = {
            name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            for name, tensor in tensors.items()
        }
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
            # A resumed run may come to a saved position again; what it would write is the same.
            if path.exists():
                return
            with written_aside(path) as draft:
                draft.mkdir()
                write_state(draft, state, write_shard(draft, tensors))
            self._saved.put(path)
            self._drop_old()
        except Exception as error:  # handed to the training thread by raise_failure
            self._failure = error

    def _drop_old(self) -> None:
        """Delete all but the newest `keep` checkpoints."""
        for path in self.complete()[: -self.keep] if self.keep else []:
            # Renamed first: killed halfway, it leaves no checkpoint that looks complete.
            shutil.rmtree(path.rename(path.with_name(ASIDE + path.name)))


def position(path: Path) -> int:
    """Position of a checkpoint in samples, as its folder's name says."""
    return int(path.name.removeprefix("samples_"))


def load_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fill tensors, {name: tensor}, in place from a checkpoint folder.

    Raises CheckpointError where the checkpoint lacks a name, has another shape or dtype, or is
    damaged; then no tensor is changed.
    """
    state = read_state(path)
    for name, tensor in tensors.items():
        stored = state["tensors"].get(name)
        if stored is None:
            raise CheckpointError(f"{path}: does not hold {name}; it was made by another model")
        if tuple(stored["shape"]) != tensor.shape:
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(stored['shape'])} there and "
                f"{tuple(tensor.shape)} in this model; use the config the run was made with"
            )
        if f"torch.{stored['dtype']}" != str(tensor.dtype):
            raise CheckpointError(
                f"{path}: {name} is {stored['dtype']} there and {tensor.dtype} in this model; use "
                "the config the run was made with"
            )
    for name, saved in read_tensors(path, state, list(tensors)).items():
        tensors[name].copy_(saved)


def load_component(path: Path, component: str) -> dict[str, torch.Tensor]:
    """The tensors of a component ("model", "exp_avg" or "exp_avg_sq"), unprefixed, on the CPU.

    Raises CheckpointError where there are none, or the checkpoint is damaged. Only the files of the
    component are read.
    """
    state = read_state(path)
    names = [name for name in state["tensors"] if name.startswith(f"{component}.")]
    if not names:
        raise CheckpointError(f"{path}: holds no {component}")
    tensors = read_tensors(path, state, names)
    return {name.removeprefix(f"{component}."): tensor for name, tensor in tensors.items()}


def _root_cause(error: BaseException) -> str:
    """The first error of a chain, that of the operating system or the library, on one line."""
    first, cause = error, error.__cause__ or error.__context__
    while cause is not None:
        first, cause = cause, cause.__cause__ or cause.__context__
    return one_line(first)
