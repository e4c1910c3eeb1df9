"""A warning where the step waits for data, with what would help."""

from __future__ import annotations

import time

from sd_perf.console import TextConsole
from sd_perf.data.usage import Usage, remedy, usable_cores
from sd_perf.training.callbacks.base import Callback, TrainerView

LIMIT = 0.05
"""share of the time that the step may wait for data, unsaid"""


class DataWaitWarning(Callback):
    """On the main rank: says once that the step waits for data, and again where the remedy changes.

    The first logged interval is passed over: nothing was made ahead of it.
    """

    def __init__(self, console: TextConsole) -> None:
        self._console = console
        self._before: tuple[float, Usage] | None = None
        self._said = ""

    def on_log(self, trainer: TrainerView, metrics: dict[str, float]) -> None:
        now, usage, before = time.monotonic(), trainer.loader.usage, self._before
        self._before = now, usage
        if before is None or metrics["data_wait"] <= LIMIT or not trainer.world.is_main:
            return
        started, used = before
        what = remedy(trainer.config.data, usage - used, now - started, usable_cores())
        kind = what.partition(":")[2]
        if kind != self._said:
            self._said = kind
            share = f"{metrics['data_wait']:.0%}"
            self._console.print(
                f"the step waits for data {share} of the time; the loader's {what}",
                soft_wrap=True,
            )
