"""Checkpoints of a run: writing them in a thread, finding and reading them.

A checkpoint is a folder `checkpoints/samples_<position>`; `sd_perf.runs.checkpoint_files` has its
format. It is written under another name and renamed when complete, so every folder of that name is
complete, at whatever moment the process dies. Where ranks hold parts of the state, each writes its
own part into one unfinished folder, and the main rank completes it.
"""

from __future__ import annotations

import queue
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from sd_perf.drafts import ASIDE, remove_leftovers
from sd_perf.errors import CheckpointError, RankLostError
from sd_perf.files import (
    first_error,
    flush,
    one_line,
    read_json,
    write_json,
    written_aside,
)
from sd_perf.runs.checkpoint_files import (
    POSITION,
    Piece,
    read_state,
    read_tensors,
    write_shard,
    write_state,
)
from sd_perf.runs.host_copy import HostCopy

MAKE_ROOM = "make room, then continue the run with --resume"
"""advice where a file of a run cannot be written"""


Named = Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor | Piece]]
"""makes the tensors of a checkpoint, by name, from copies of buffers"""
PEER_SECONDS = 600.0
"""how long the main rank waits for another rank's part, after its own is written"""


class CheckpointStore:
    """The `checkpoints` folder of one run.

    `keep` is how many checkpoints stay; None keeps all. `writer` is (rank, ranks) of those that
    write: rank 0 of 1, unless all ranks hold a part of the state. `lost` says which of them is
    gone, in words; empty while all are there.
    """

    def __init__(
        self,
        folder: Path,
        keep: int | None = None,
        writer: tuple[int, int] = (0, 1),
        lost: Callable[[], str] = str,
    ) -> None:
        self.folder = folder
        self.keep = keep
        self.rank, self.ranks = writer
        self._lost = lost
        self._host = HostCopy()
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

    def path(self, samples: int) -> Path:
        """The folder of the checkpoint at a position."""
        return self.folder / f"samples_{samples:010d}"

    def begin(self) -> None:
        """Clear away what was left by writers that were killed.

        Called by the main rank before any rank saves.
        """
        self.wait()
        remove_leftovers(self.folder)

    def reserve(self, buffers: Mapping[str, torch.Tensor]) -> None:
        """Allocate the host memory that `save` copies to: seconds, where it is page-locked."""
        self._host.reserve(buffers)

    def save(
        self,
        buffers: Mapping[str, torch.Tensor],
        state: dict[str, Any],
        named: Named = dict,
    ) -> Path:
        """Copy the buffers to the host, then write them in a thread; returns the folder's path.

        `named` makes of the copies the tensors to write, by name; the thread calls it. Waits for
        the write before it; raises CheckpointError where that one failed.
        """
        self.wait()
        path = self.path(state["samples"])
        # A copy, so that the optimizer may change the weights while the thread writes.
        copies = self._host.take(buffers)
        self._thread = threading.Thread(
            target=self._write, args=(path, copies, state, named), name="checkpoint writer"
        )
        self._thread.start()
        return path

    def wait(self) -> None:
        """Block until the write under way is done; raises CheckpointError where it failed, and
        RankLostError where another rank's part will not come."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_failure()

    def raise_failure(self) -> None:
        """CheckpointError where the last write failed; does not block."""
        failure, self._failure = self._failure, None
        if isinstance(failure, RankLostError):
            raise RankLostError(f"{failure}; {self.newest_in_words()}")
        if failure is not None:
            why = one_line(first_error(failure))
            raise CheckpointError(
                f"{self.folder}: a checkpoint could not be written ({why}); "
                f"{self.newest_in_words()}; {MAKE_ROOM}"
            )

    def take_saved(self) -> list[Path]:
        """Checkpoints that were completed since the last call, oldest first; does not block."""
        return [self._saved.get() for _ in range(self._saved.qsize())]

    def _write(
        self, path: Path, copies: dict[str, torch.Tensor], state: dict[str, Any], named: Named
    ) -> None:
        try:
            self._host.wait()
            tensors = named(copies)
            self.folder.mkdir(parents=True, exist_ok=True)
            # A resumed run may come to a saved position again; what it would write is the same.
            if path.exists():
                return
            if self.ranks > 1:
                self._write_part(path, tensors, state)
            else:
                with written_aside(path) as draft:
                    draft.mkdir()
                    write_state(draft, state, write_shard(draft, tensors))
            if self.rank == 0:
                self._saved.put(path)
                self._drop_old()
        except Exception as error:  # handed to the training thread by raise_failure
            self._failure = error

    def _write_part(
        self, path: Path, tensors: Mapping[str, torch.Tensor | Piece], state: dict[str, Any]
    ) -> None:
        """Write this rank's part; the main rank waits for the others' and completes the folder."""
        draft = path.with_name(f"{ASIDE}{path.name}.parts")
        draft.mkdir(exist_ok=True)
        try:
            written = write_shard(draft, tensors, self.rank, self.ranks)
            for file in written["files"]:
                flush(draft / file)
        except Exception as error:
            write_json(_report(draft, self.rank), {"failed": one_line(error)})
            raise
        write_json(_report(draft, self.rank), written)
        if self.rank:
            return
        parts = [self._wait_for_part(draft, rank) for rank in range(self.ranks)]
        write_state(draft, state, *parts)
        for rank in range(self.ranks):
            _report(draft, rank).unlink()
        flush(draft)
        draft.replace(path)
        flush(path.parent)

    def _wait_for_part(self, draft: Path, rank: int) -> dict[str, Any]:
        """What a rank wrote, when it has; CheckpointError where it failed or is silent for too
        long, RankLostError where a rank is gone."""
        end = time.monotonic() + PEER_SECONDS
        while not _report(draft, rank).exists():
            if lost := self._lost():
                raise RankLostError(lost)
            if time.monotonic() > end:
                raise CheckpointError(f"rank {rank} wrote nothing in {PEER_SECONDS:.0f} s")
            time.sleep(0.02)
        part = read_json(_report(draft, rank))
        if "failed" in part:
            raise CheckpointError(f"rank {rank} could not write its part: {part['failed']}")
        return part

    def _drop_old(self) -> None:
        """Delete all but the newest `keep` checkpoints."""
        for path in self.complete()[: -self.keep] if self.keep else []:
            # Renamed first: killed halfway, it leaves no checkpoint that looks complete.
            shutil.rmtree(path.rename(path.with_name(ASIDE + path.name)))


def _report(draft: Path, rank: int) -> Path:
    """The file in which a rank tells what it wrote, or that it failed."""
    return draft / f"rank_{rank:05d}.json"


def position(path: Path) -> int:
    """Position of a checkpoint in samples, as its folder's name says."""
    return int(path.name.removeprefix("samples_"))


def load_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint folder that have these names, shapes and dtypes, on the CPU.

    Raises CheckpointError where the checkpoint lacks a name, has another shape or dtype, or is
    damaged.
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
    return read_tensors(path, state, list(tensors))


def load_component(path: Path, component: str) -> dict[str, torch.Tensor]:
    """The tensors of a component ("model", "exp_avg", ...), unprefixed, on the CPU.

    Raises CheckpointError where there are none, or the checkpoint is damaged. Only the files of the
    component are read.
    """
    return _component(path, read_state(path), component)


def _component(path: Path, state: dict[str, Any], component: str) -> dict[str, torch.Tensor]:
    names = [name for name in state["tensors"] if name.startswith(f"{component}.")]
    if not names:
        raise CheckpointError(f"{path}: holds no {component}")
    tensors = read_tensors(path, state, names)
    return {name.removeprefix(f"{component}."): tensor for name, tensor in tensors.items()}


def load_weights(path: Path, ema: bool = False) -> dict[str, torch.Tensor]:
    """The UNet's weights in a checkpoint, or with `ema` their moving average, on the CPU.

    Raises CheckpointError as `load_component` does, and where the run keeps no average.
    """
    state = read_state(path)
    if ema and not any(name.startswith("ema.") for name in state["tensors"]):
        raise CheckpointError(
            f"{path}: holds no averaged weights, which training.ema_decay asks for; take the "
            "weights themselves (without --ema; as model.init, with model.init_ema false)"
        )
    return _component(path, state, "ema" if ema else "model")
