"""Copies curves, scores and pictures of the run to the tools that logging.sinks names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sd_perf.sinks.feed import Feed
from sd_perf.training.callbacks.base import Callback, TrainerView


class SendToSinks(Callback):
    """The main rank sends. Comes after `MetricsFile`, whose lines it takes up at the start."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._feed: Feed | None = None

    def on_start(self, trainer: TrainerView) -> None:
        if trainer.world.is_main:
            self._feed = Feed(trainer.folder, trainer.config, self._tell, trainer.samples)
            self._feed.catch_up()

    def on_log(self, trainer: TrainerView, metrics: dict[str, float]) -> None:
        if self._feed:
            self._feed.step(metrics)

    def on_step(self, trainer: TrainerView) -> None:
        # After `DrawSamples`, where that is one of the run's callbacks.
        every = trainer.config.sampling.every_samples
        if self._feed and every and trainer.steps % trainer.config.steps_of(every) == 0:
            self._feed.take_scores_and_pictures()

    def checkpoint_saved(self, trainer: TrainerView, path: Path) -> None:
        # An evaluation beside the run has scored an earlier one since the last.
        if self._feed:
            self._feed.take_scores_and_pictures()

    def close(self, trainer: TrainerView) -> None:
        if self._feed:
            self._feed.close()
