"""Saves training state on its cadence, at the end, and when the run is asked to stop."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from sd_perf.training.callbacks.base import Callback

if TYPE_CHECKING:
    from sd_perf.training.trainer import Trainer

logger = logging.getLogger(__name__)


class Checkpointer(Callback):
    """Training waits for the host copy only; the trainer stops before the next step where a write
    has failed."""

    def on_step(self, trainer: Trainer) -> None:
        cadence = trainer.config.steps_of(trainer.config.checkpoint.every_samples)
        if trainer.steps % cadence == 0 or trainer.is_over:
            trainer.check()
            path = trainer.world.on_main(trainer.save)
            logger.info("saving %s", path)

    def on_end(self, trainer: Trainer) -> None:
        trainer.store.wait()

    def close(self, trainer: Trainer) -> None:
        trainer.store.wait()
