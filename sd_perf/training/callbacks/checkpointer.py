"""Saves the training state regularly, at the end, and when the run is asked to stop."""

from __future__ import annotations

import logging

from sd_perf.training.callbacks.base import Callback, TrainerView

logger = logging.getLogger(__name__)


class Checkpointer(Callback):
    """Training waits only while the state is copied to host memory; a thread writes it to disk.

    Where writing fails, the trainer stops before its next step.
    """

    def on_step(self, trainer: TrainerView) -> None:
        cadence = trainer.config.steps_of(trainer.config.checkpoint.every_samples)
        if trainer.steps % cadence == 0 or trainer.is_over:
            trainer.checked_loss()
            trainer.world.on_main(trainer.loader.require_unchanged)
            path = trainer.save()
            logger.info("saving %s", path)

    def on_end(self, trainer: TrainerView) -> None:
        trainer.store.wait()

    def close(self, trainer: TrainerView) -> None:
        trainer.store.wait()
