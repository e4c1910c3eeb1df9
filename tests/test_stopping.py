"""Signals that ask to stop: which one counts, what is said, and when."""

from __future__ import annotations

import os
import signal
import sys
import time

import pytest

from sd_perf import stopping
from sd_perf.stopping import CTRL_C, STOP_SIGNALS, STOPPED, Stopped, StopRequests


@pytest.fixture
def stop():
    requests = StopRequests()
    requests.take()
    yield requests
    requests.give_back()


class Clock:
    """In place of `time`: seconds pass only where something sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    """The clock of the handlers."""
    mine = Clock()
    monkeypatch.setattr(stopping, "time", mine)
    return mine


class Left(BaseException):
    pass


@pytest.fixture(autouse=True)
def left(monkeypatch):
    """os._exit raises Left, with the exit code."""

    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr(os, "_exit", leave)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_command_stops_at_once(number, stop, capfd):
    with pytest.raises(Stopped) as stopped:
        signal.raise_signal(number)
    assert stopped.value.exit_code == (CTRL_C if number == signal.SIGINT else STOPPED)
    assert capfd.readouterr().err.startswith("sd-perf: stopped by ")


def test_an_import_is_not_interrupted(stop, tmp_path, monkeypatch):
    """An exception within numpy's would leave it half imported: an ImportError wherever it goes."""
    module = "import signal\nsignal.raise_signal(signal.SIGTERM)\nimport time\ntime.sleep(0.2)\n"
    (tmp_path / "interrupted.py").write_text(f"{module}complete = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Stopped) as stopped:
        __import__("interrupted")
        time.sleep(60)
    assert stopped.value.exit_code == STOPPED
    assert sys.modules.pop("interrupted").complete


def test_cleaning_up_is_not_disturbed(stop, clock, capfd):
    with pytest.raises(Stopped):
        signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)  # within one press
    assert len(capfd.readouterr().err.splitlines()) == 1
    clock.sleep(2 * stopping.ONE_PRESS)
    with pytest.raises(Left, match=str(CTRL_C)):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_training_is_told_and_goes_on(number, stop, capfd):
    with stop.deferred():
        for _ in range(3):
            signal.raise_signal(number)
        assert stop.received == number
    [line] = capfd.readouterr().err.splitlines()
    again = "Ctrl-C: saving after this step; Ctrl-C again to quit without"
    later = f"{number.name}: saving after this step; Ctrl-C to quit without"
    assert line == "sd-perf: " + (again if number == signal.SIGINT else later)


def test_two_at_once_are_one_press_and_a_second_press_quits(stop, clock):
    with stop.deferred():
        signal.raise_signal(signal.SIGINT)
        clock.sleep(0.005)
        signal.raise_signal(signal.SIGINT)
        clock.sleep(2 * stopping.ONE_PRESS)
        signal.raise_signal(signal.SIGTERM)
        clock.sleep(2 * stopping.ONE_PRESS)
        with pytest.raises(Stopped) as stopped:
            signal.raise_signal(signal.SIGINT)
        assert stopped.value.exit_code == CTRL_C
        clock.sleep(2 * stopping.ONE_PRESS)
        with pytest.raises(Left, match=str(CTRL_C)):
            signal.raise_signal(signal.SIGINT)


def test_what_is_ignored_stays_ignored(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        requests = StopRequests()
        requests.take()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        requests.give_back()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_waiting_ends_at_a_signal(stop, clock, monkeypatch, capfd):
    begun = clock.now
    monkeypatch.setattr(clock, "sleep", lambda seconds: signal.raise_signal(signal.SIGTERM))
    stop.wait(60)
    assert stop.received == signal.SIGTERM and capfd.readouterr().err == ""
    assert clock.now == begun


def test_waiting_ends_when_it_is_time(stop, clock):
    begun = clock.now
    stop.wait(60)
    assert stop.received is None and clock.now - begun == pytest.approx(60, abs=0.1)
