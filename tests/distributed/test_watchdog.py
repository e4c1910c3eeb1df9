"""A rank that is killed or stopped is named by the others, which end with an exit code of their
own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

from sd_perf.distributed import watchdog as module
from sd_perf.distributed.launcher import Place
from sd_perf.distributed.watchdog import Watchdog
from sd_perf.errors import RankLostError
from tests.waiting import PATIENCE, wait_for

TRAINING = """
import os, signal, sys
from sd_perf.distributed.world import start_world
from sd_perf.errors import RankLostError
world = start_world("cpu", silence_seconds=float(sys.argv[3]))
world.max(1)
if world.rank == int(sys.argv[1]):
    os.kill(os.getpid(), int(sys.argv[2]))
try:
    with world.losses_named(lambda: "saved"):
        while True:
            world.max(1)
except RankLostError as error:
    print(error, flush=True)
    os._exit(error.exit_code)
"""


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("rank", "how", "silence", "told"),
    [
        (1, "KILL", PATIENCE, "is gone"),
        (0, "KILL", PATIENCE, "is gone"),
        (1, "STOP", 10, "is silent for 10 s"),
    ],
)
def test_a_lost_rank_is_named(rank, how, silence, told):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    number = {"KILL": "9", "STOP": "19"}[how]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TRAINING, str(rank), number, str(silence)],
            env={**shared, "RANK": own, "LOCAL_RANK": own},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for own in "01"
    ]
    lost, left = processes[rank], processes[1 - rank]
    try:
        output, errors = left.communicate(timeout=PATIENCE)
    finally:
        lost.kill()
        lost.communicate()
        left.kill()
    assert left.returncode == RankLostError.exit_code, errors
    assert output.startswith(f"rank {rank} on ") and "Traceback" not in errors
    assert output.strip().endswith(f"(process {lost.pid}) {told}; saved")


def test_who_is_no_rank_and_who_is_slow_to_say_so_hold_nobody_up(monkeypatch):
    """A rank may be kept from running between its connection and its first words."""
    monkeypatch.setattr(module, "_cut_connections", lambda: None)
    told: dict[str, str] = {}
    watchdog = Watchdog(Place(0, 3, 0, "127.0.0.1", 1), silence=PATIENCE)
    watchdog._handled.set()  # its process is this one, which goes on
    watchdog.start(SimpleNamespace(set=told.__setitem__))
    token, port, _ = told["watchdog"].split(" ", 2)
    stranger, slow, brief = (socket.create_connection(("127.0.0.1", int(port))) for _ in range(3))
    with stranger, slow, brief:
        stranger.sendall("ä b c\n".encode())
        assert stranger.recv(1) == b""  # sent away
        brief.sendall(f"{token} 1 here (process 7)\n!".encode())  # and has left in order
        brief.close()
        slow.sendall(f"{token} 2 there (process 8)\n".encode())
        assert slow.recv(1) == b"." and not watchdog.lost
        slow.close()
        wait_for(lambda: watchdog.lost)
    assert watchdog.lost == "rank 2 on there (process 8) is gone"
