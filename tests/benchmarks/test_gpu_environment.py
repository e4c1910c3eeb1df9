"""What is told of a GPU: its clocks under load, by an nvidia-smi that is only asked."""

from __future__ import annotations

import itertools
import threading
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_environment
from tests.waiting import PATIENCE


def test_telemetry_tells_of_the_settled_half() -> None:
    samples = [
        ["345", "80", "30", "0x1"],
        ["1980", "400", "45", "0x0"],
        ["1755", "695.2", "61", "0x0000000000000004"],
        ["1725", "[N/A]", "63", "0x24"],
    ]
    assert gpu_environment.summarise_telemetry(samples) == {
        "sm_clock_mhz": 1740.0,
        "power_w": 695.2,
        "temperature_c": 63.0,
        "clock_event_reasons": ["software power cap", "software thermal slowdown"],
    }
    assert set(gpu_environment.summarise_telemetry([]).values()) == {None}


def test_telemetry_samples_while_the_block_runs() -> None:
    answers = itertools.count()
    third = threading.Event()

    def query() -> list[str] | None:
        number = next(answers)
        if number == 3:
            third.set()
        return None if number == 0 else [str(1000 + number), "1", "2", "0x0"]

    with gpu_environment.Telemetry(query, period_seconds=0.001) as telemetry:
        assert third.wait(PATIENCE)
    assert telemetry.summary()["sm_clock_mhz"] >= 1001


def test_nvidia_smi_is_only_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def answer(command: list[str]) -> str:
        commands.append(command)
        return "1980, 695.2"

    monkeypatch.setattr(gpu_environment, "_output_of", answer)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="12-34")
    )
    assert gpu_environment.nvidia_smi(("clocks.sm", "power.draw")) == ["1980", "695.2"]
    query = "--query-gpu=clocks.sm,power.draw"
    assert commands == [["nvidia-smi", query, "--format=csv,noheader,nounits", "--id=GPU-12-34"]]
    assert gpu_environment.nvidia_smi(("clocks.sm",)) is None
