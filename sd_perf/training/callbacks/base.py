"""Callbacks: hooks that the trainer calls, and the part of the trainer that they may use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from sd_perf.config import Config
from sd_perf.data.batch import Loader
from sd_perf.distributed.world import World
from sd_perf.runs.checkpoints import CheckpointStore


class TrainerView(Protocol):
    """The part of the trainer that callbacks use."""

    config: Config
    world: World
    folder: Path
    """the run folder"""
    store: CheckpointStore
    loader: Loader
    seed: int
    samples: int
    """position: samples trained on so far"""
    total_samples: int
    """length of the run, whole steps"""
    stop_reason: str | None
    """set it on every rank at the same step to end training after that step"""

    @property
    def steps(self) -> int:
        """Optimizer steps taken since sample 0."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether the step just taken is the last of this process."""
        ...

    def checked_loss(self) -> float:
        """Mean loss of the last step over all ranks; all must call it. Raises for a bad run."""
        ...

    def weights(self) -> Mapping[str, torch.Tensor]:
        """The network's weights by name, whole on every rank; all must call it. Not copies."""
        ...

    def save(self) -> Path:
        """Begin to write a checkpoint; all ranks must call it."""
        ...


class Callback:
    """Every hook does nothing; a callback overrides what it needs.

    Hooks run on every rank, in list order, except `checkpoint_saved`.
    """

    def on_start(self, trainer: TrainerView) -> None:
        """Before the first step, with state loaded."""

    def before_step(self, trainer: TrainerView) -> None:
        """Before each optimizer step, when its batches are there."""

    def on_step(self, trainer: TrainerView) -> None:
        """After each optimizer step; `trainer.samples` counts it."""

    def on_log(self, trainer: TrainerView, metrics: dict[str, float]) -> None:
        """After each logged step, with its metrics over all ranks."""

    def checkpoint_saved(self, trainer: TrainerView, path: Path) -> None:
        """On the main rank, when a checkpoint is complete on disk: at the next step or the end."""

    def on_end(self, trainer: TrainerView) -> None:
        """After the last step, also when the run was asked to stop."""

    def close(self, trainer: TrainerView) -> None:
        """Last of all, also after an exception."""

    def state_dict(self) -> dict[str, Any]:
        """State that a resumed run needs, as JSON; checkpoints keep it under the class's name."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; called only where the checkpoint holds a state."""
