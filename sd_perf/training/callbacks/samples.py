"""Pictures of fixed prompts while the network trains: a grid every sampling.every_samples."""

from __future__ import annotations

from collections.abc import Callable

from sd_perf.errors import CheckpointError
from sd_perf.evaluation.evaluate import grid_path
from sd_perf.evaluation.fixed_prompts import FixedPrompts
from sd_perf.training.callbacks.base import Callback, TrainerView


class DrawSamples(Callback):
    """The main rank draws, and the others wait; weights and random streams stay as they are.

    The first grid is drawn at the start, so that what cannot be drawn is told before training, and
    the last one at the end.
    """

    def __init__(self, pictures: FixedPrompts | None, tell: Callable[[str], None]) -> None:
        """`pictures` is None on other ranks than the main one."""
        self._pictures, self._tell = pictures, tell

    def on_start(self, trainer: TrainerView) -> None:
        self._draw(trainer)

    def on_step(self, trainer: TrainerView) -> None:
        # A run that was asked to stop saves at once; its next start draws.
        every = trainer.config.steps_of(trainer.config.sampling.every_samples or 0)
        is_due = trainer.steps % every == 0 or trainer.samples >= trainer.total_samples
        if is_due and trainer.stop_reason is None:
            self._draw(trainer)

    def _draw(self, trainer: TrainerView) -> None:
        weights = trainer.weights()

        def draw() -> None:
            if self._pictures is None:
                return
            # A grid that is there already is of the same weights, drawn before the run was killed,
            # or the evaluation's.
            if grid_path(trainer.folder / "samples", trainer.samples).is_file():
                return
            try:
                self._pictures.draw(weights, trainer.seed, trainer.samples)
            except CheckpointError as error:
                # The loss decides whether the run goes on: guidance can overflow where it is well.
                self._tell(f"no pictures at {trainer.samples:,} samples: {error}")

        trainer.world.on_main(draw)
