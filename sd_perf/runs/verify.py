"""Checks the checkpoints of a run without loading them into a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sd_perf.errors import CheckpointError
from sd_perf.runs.checkpoint_files import read_state, read_tensors
from sd_perf.runs.checkpoints import CheckpointStore
from sd_perf.runs.folder import read_manifest, require_of_run


def verify_run(run: Path) -> Iterator[tuple[Path, str]]:
    """Each checkpoint, oldest first, and what is wrong with it; "" where it is good.

    A checkpoint is good where it is the run's, every file has its digest, and every tensor is as
    `state.json` says. Raises UserError where `run` is no run folder or holds no checkpoint.
    """
    read_manifest(run)
    paths = CheckpointStore(run / "checkpoints").complete()
    if not paths:
        raise CheckpointError(f"{run}: holds no complete checkpoint to verify")
    for path in paths:
        try:
            state = read_state(path)
            require_of_run(path, state, run)
            read_tensors(path, state, list(state["tensors"]))
        except CheckpointError as error:
            yield path, str(error)
        else:
            yield path, ""
