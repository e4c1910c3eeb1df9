"""A rank that is killed or stopped is named by the others, which end with an exit code of their
own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from sd_perf.errors import RankLostError
from tests.waiting import PATIENCE

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
