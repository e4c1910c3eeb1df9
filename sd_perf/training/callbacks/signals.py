"""SIGTERM, SIGUSR1 and Ctrl-C: the run saves and leaves, on every rank at the same step."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

from sd_perf.training.callbacks.base import Callback, TrainerView

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_AGREE_EVERY_STEPS = 4
"""steps between agreements of the ranks, each a round trip through the CPU group"""


class StopOnSignal(Callback):
    """Sets `trainer.stop_reason` on every rank at the same step."""

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def on_start(self, trainer: TrainerView) -> None:
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._receive)

    def on_step(self, trainer: TrainerView) -> None:
        if trainer.world.size > 1 and trainer.steps % _AGREE_EVERY_STEPS:
            return
        received = trainer.world.max(self._received or 0)
        if received:
            trainer.stop_reason = signal.Signals(received).name

    def close(self, trainer: TrainerView) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._received is signal.SIGINT and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signal.Signals(number)
