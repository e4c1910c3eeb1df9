"""Live progress: a bar on a terminal, plain lines elsewhere; a table at the end."""

from __future__ import annotations

import datetime
import time

from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from sd_perf.console import TextConsole, styled
from sd_perf.training.callbacks.base import Callback, TrainerView
from sd_perf.visible import visible


class ProgressDisplay(Callback):
    """On the main rank: samples, loss, samples/s and time left; a summary at the end."""

    def __init__(self, console: TextConsole) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._losses: list[float] = []
        self._start_samples = 0
        self._start_time = 0.0

    def on_start(self, trainer: TrainerView) -> None:
        if not trainer.world.is_main:
            return
        self._start_samples, self._start_time = trainer.samples, time.monotonic()
        where = f"{trainer.world.device} x {trainer.world.size}"
        begin = (
            f"resuming at sample {trainer.samples:,}" if trainer.samples else "starting at sample 0"
        )
        told = (
            f": {begin} of {trainer.total_samples:,} on {where}, "
            f"{trainer.config.training.precision}, seed {trainer.seed}"
        )
        self.console.print(Text.assemble(styled("bold", trainer.folder), told), soft_wrap=True)
        if self.console.is_terminal:
            columns = [TextColumn("{task.fields[line]}", markup=False), BarColumn()]
            self._bar = Progress(*columns, console=self.console)
            self._bar.add_task(
                "", total=trainer.total_samples, completed=trainer.samples, line="first step ..."
            )
            self._bar.start()

    def on_log(self, trainer: TrainerView, metrics: dict[str, float]) -> None:
        if not trainer.world.is_main:
            return
        self._losses.append(metrics["loss"])
        line = self._line(trainer, metrics)
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=metrics["samples"], line=line)
        else:
            self.console.print(line, soft_wrap=True)

    def on_end(self, trainer: TrainerView) -> None:
        self._stop_bar()
        if trainer.world.is_main and self._losses and trainer.samples >= trainer.total_samples:
            self.console.print(self._summary(trainer))
            if trainer.config.run.note:
                self.console.print(trainer.config.run.note.strip(), width=100)

    def close(self, trainer: TrainerView) -> None:
        self._stop_bar()

    def _line(self, trainer: TrainerView, metrics: dict[str, float]) -> str:
        samples = int(metrics["samples"])
        left = (trainer.total_samples - samples) / metrics["samples_per_second"]
        return (
            f"{samples:,}/{trainer.total_samples:,} samples  loss {metrics['loss']:.4f}  "
            f"lr {metrics['lr']:.2e}  {metrics['samples_per_second']:.1f} samples/s  "
            f"{_clock(left)} left"
        )

    def _summary(self, trainer: TrainerView) -> Table:
        tenth = max(1, len(self._losses) // 10)
        steps = "logged step" if tenth == 1 else f"mean of {tenth} logged steps"
        seconds = time.monotonic() - self._start_time
        samples = trainer.samples - self._start_samples
        rows = {
            "samples": f"{trainer.samples:,}"
            + (f" ({samples:,} of them now)" if self._start_samples else ""),
            "loss at first": f"{sum(self._losses[:tenth]) / tenth:.4f} ({steps})",
            "loss at last": f"{sum(self._losses[-tenth:]) / tenth:.4f} ({steps})",
            "time": f"{_clock(seconds)} ({samples / seconds:.1f} samples/s, checkpoints included)",
            "newest checkpoint": visible(trainer.store.newest()),
        }
        table = Table(show_header=False, title=visible(trainer.folder), title_justify="left")
        for name, value in rows.items():
            table.add_row(name, value)
        return table

    def _stop_bar(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
