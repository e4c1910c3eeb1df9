"""What surrounds the training loop."""

from __future__ import annotations

import pytest
import torch

from sd_perf.console import TextConsole
from sd_perf.distributed.world import start_world
from sd_perf.training.launch import launch
from sd_perf.training.trainer import Trainer


@pytest.mark.parametrize("deterministic", [False, True])
def test_convolutions_are_tuned_unless_the_run_is_deterministic(
    deterministic, make_config, monkeypatch
):
    seen = []
    monkeypatch.setattr(Trainer, "fit", lambda trainer: seen.append(torch.backends.cudnn.benchmark))
    config = make_config(training={"deterministic": deterministic})
    try:
        launch(
            config, start_world("cpu"), resume=False, fresh=False, console=TextConsole(quiet=True)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [not deterministic] and torch.backends.cudnn.benchmark is False
