"""What watches a run: each callback is told of four moments and may read the trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sd_perf.training.trainer import Trainer


class Callback:
    """Every hook does nothing; a callback overrides what it needs. Hooks run on every rank, in list
    order."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step, with state loaded."""

    def on_step(self, trainer: Trainer) -> None:
        """After each optimizer step; `trainer.samples` counts it."""

    def on_log(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """After each logged step, with its metrics over all ranks."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step, also when the run was asked to stop."""

    def close(self, trainer: Trainer) -> None:
        """Last of all, also after an exception."""
