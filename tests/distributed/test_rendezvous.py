"""How processes meet, and what is said where one does not come."""

from __future__ import annotations

import re
import socket
import threading
import time

import pytest

from sd_perf.distributed import rendezvous
from sd_perf.distributed.launcher import Place
from sd_perf.distributed.rendezvous import meet
from sd_perf.errors import ConfigError
from tests.waiting import PATIENCE


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Clock(threading.local):
    """In place of `time`: a second passes for a process, here a thread, where it waits to look
    again. How long a busy machine keeps it from running does not count."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds / 4)
        self.now += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time as the processes that meet see it."""
    monkeypatch.setattr(rendezvous, "time", Clock())


def place(rank: int, port: int, size: int = 2) -> Place:
    return Place(rank, size, rank, "127.0.0.1", port)


def meet_all(ranks: list[int], port: int, size: int, seconds: float) -> list[object]:
    """The store, or the sentence, of each process; here each is a thread."""
    results: list[object] = [None] * len(ranks)

    def join(number: int, rank: int) -> None:
        try:
            results[number] = meet(place(rank, port, size), seconds)
        except ConfigError as error:
            results[number] = str(error)

    threads = [threading.Thread(target=join, args=pair) for pair in enumerate(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    return results


def test_all_come(port):
    first, second = meet_all([0, 1], port, size=2, seconds=60)
    first.set("key", "value")
    assert second.get("key") == b"value"


def test_some_do_not_come(port, clock, capfd):
    told = meet_all([0, 2], port, size=4, seconds=60)[0]
    assert told == (
        "2 of 4 processes have come within 60 s; missing: rank 1, 3; start them, or raise "
        "--run.join-seconds"
    )
    # rank 2 may not have come yet when rank 0 says it
    assert re.search("sd-perf: waiting for [23] more processes", capfd.readouterr().err)


def test_rank_0_does_not_come(port, clock, capfd):
    with pytest.raises(ConfigError, match=r"within 10 s \(Connection refused\);"):
        meet(place(1, port), seconds=10)
    assert f"sd-perf: rank 1: waiting for rank 0 at 127.0.0.1:{port}" in capfd.readouterr().err


def test_a_rank_comes_twice(port, clock):
    told = meet_all([0, 1, 1], port, size=3, seconds=60)
    assert "RANK: 1 is taken by two processes; start each rank once" in told[1:]


def test_a_port_that_is_taken(port):
    with socket.socket() as other:
        other.bind(("", port))
        other.listen()
        with pytest.raises(ConfigError, match=f"cannot listen at 127.0.0.1:{port}"):
            meet(place(0, port), seconds=60)
