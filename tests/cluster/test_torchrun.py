"""The exit code of several processes, and signals to them."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from sd_perf.cluster.torchrun import _hand_on, exit_code
from sd_perf.stopping import Stopped


@pytest.mark.parametrize(
    ("codes", "ended"),
    [([75, 75], 75), ([-9], 76), ([76, -9], 76), ([2, 76], 2), ([1, 76], 1), ([76, 76], 76)],
)
def test_who_ended_the_run(codes, ended):
    assert exit_code(codes) == ended


def test_a_signal_before_there_are_processes_stops_at_once(monkeypatch):
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter(()))
    with pytest.raises(Stopped) as stop:
        _hand_on(signal.SIGUSR1, None)
    assert stop.value.exit_code == 75
