"""The wait for data is measured as it is, and told with what would help."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest

from sd_perf.console import TextConsole
from sd_perf.data.usage import Usage
from sd_perf.training import trainer as trainer_module
from sd_perf.training.callbacks import data_wait
from sd_perf.training.callbacks.base import Callback
from sd_perf.training.callbacks.data_wait import DataWaitWarning


class Clock:
    """Seconds that pass only where they are made to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Logged(Callback):
    def __init__(self) -> None:
        self.waits: list[float] = []

    def on_log(self, trainer, metrics) -> None:
        self.waits.append(metrics["data_wait"])


def test_the_share_is_that_of_the_time_between_steps(make_config, make_trainer, monkeypatch):
    clock, logged = Clock(), Logged()
    monkeypatch.setattr(trainer_module, "time", clock)
    config = make_config(training={"max_samples": 24}, logging={"every_steps": 2})
    trainer = make_trainer(config, [logged])
    batches, step = trainer.loader.batches, trainer.step.__call__
    slow = [3.0, 3.0, 0.0, 1.0, 0.0, 0.0]

    def waiting(position):
        for seconds, batch in zip(slow, batches(position), strict=False):
            clock.now += seconds
            yield batch

    def computing(step_batches, number):
        clock.now += 1.0
        return step(step_batches, number)

    monkeypatch.setattr(trainer.loader, "batches", waiting)
    monkeypatch.setattr(type(trainer.step), "__call__", lambda _, *given: computing(*given))
    trainer.fit()
    assert logged.waits == pytest.approx([6 / 8, 1 / 3, 0])


def test_warning_is_said_once_for_each_remedy(monkeypatch):
    clock, out = Clock(), io.StringIO()
    monkeypatch.setattr(data_wait, "time", clock)
    monkeypatch.setattr(data_wait, "usable_cores", lambda: 8)
    warning = DataWaitWarning(TextConsole(file=out, width=300))
    trainer = SimpleNamespace(
        config=SimpleNamespace(
            data=SimpleNamespace(workers=2, prefetch_batches=4, format="moments")
        ),
        loader=SimpleNamespace(usage=Usage()),
        world=SimpleNamespace(is_main=True),
    )

    def log(share: float, seconds: float, cpu: float) -> str:
        clock.now += 10
        trainer.loader.usage = Usage(
            trainer.loader.usage.batches + 5,
            trainer.loader.usage.seconds + seconds,
            trainer.loader.usage.cpu_seconds + cpu,
        )
        out.seek(0)
        out.truncate()
        warning.on_log(trainer, {"data_wait": share})
        return out.getvalue()

    assert log(0.9, 19, 19) == ""  # nothing was made ahead of the first interval
    assert log(0.04, 19, 19) == ""
    said = log(0.25, 19, 19)
    assert said.startswith("the step waits for data 25% of the time; the loader's threads are busy")
    assert "raise data.workers (2)" in said
    assert log(0.3, 18.5, 18) == ""  # the same again
    assert "wait for the storage" in log(0.3, 19, 1)
    trainer.world.is_main = False
    assert log(0.3, 9, 9) == ""
