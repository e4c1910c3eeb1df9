"""What surrounds the training loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sd_perf.console import TextConsole
from sd_perf.distributed.world import start_world
from sd_perf.runs.folder import read_run_config
from sd_perf.training.launch import launch
from sd_perf.training.trainer import Trainer


@pytest.mark.parametrize("deterministic", [False, True])
def test_convolutions_are_tuned_unless_the_run_is_deterministic(
    deterministic, make_config, monkeypatch
):
    seen = []

    def fit(trainer: Trainer) -> None:
        filled = torch.utils.deterministic.fill_uninitialized_memory
        seen.append((torch.backends.cudnn.benchmark, filled))

    monkeypatch.setattr(Trainer, "fit", fit)
    config = make_config(training={"deterministic": deterministic})
    try:
        launch(
            config, start_world("cpu"), resume=False, fresh=False, console=TextConsole(quiet=True)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [(not deterministic, False)] and torch.backends.cudnn.benchmark is False


@pytest.mark.slow
def test_threads_are_kept_unless_given(make_config, capsys):
    """A run's sums depend on its threads, so a resumed run takes those of its manifest."""
    world, console, before = start_world("cpu"), TextConsole(width=100), torch.get_num_threads()

    def start(samples: int, resume: bool, **training: int) -> tuple[int, str]:
        config = make_config(training={"max_samples": samples, **training})
        launch(config, world, resume=resume, fresh=False, console=console)
        recorded = read_run_config(Path(config.run.dir)).training.cpu_threads
        assert recorded == torch.get_num_threads()
        return recorded, capsys.readouterr().out

    try:
        torch.set_num_threads(2)
        assert start(4, resume=False)[0] == 2
        torch.set_num_threads(1)  # another machine, or another environment
        threads, output = start(8, resume=True)
        assert threads == 2 and "cpu_threads" not in output
        threads, output = start(12, resume=True, cpu_threads=1)
        assert threads == 1 and "cpu_threads: 2 in this run until now, 1 from here" in output
    finally:
        torch.set_num_threads(before)
