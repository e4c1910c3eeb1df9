"""A signal to stop while training: every rank leaves after the same step, and the run is saved."""

from __future__ import annotations

import contextlib
import signal

from sd_perf.stopping import STOP
from sd_perf.training.callbacks.base import Callback, TrainerView

_AGREE_EVERY_STEPS = 4
"""steps between agreements of the ranks, each a round trip through the CPU group"""


class StopOnSignal(Callback):
    """Sets `trainer.stop_reason` on every rank at the same step."""

    def __init__(self) -> None:
        self._deferred = contextlib.ExitStack()

    def on_start(self, trainer: TrainerView) -> None:
        self._deferred.enter_context(STOP.deferred())

    def on_step(self, trainer: TrainerView) -> None:
        if trainer.world.size > 1 and trainer.steps % _AGREE_EVERY_STEPS:
            return
        received = trainer.world.max(STOP.received or 0)
        if received:
            trainer.stop_reason = signal.Signals(received).name

    def close(self, trainer: TrainerView) -> None:
        self._deferred.close()
