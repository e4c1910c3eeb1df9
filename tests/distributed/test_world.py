"""The collectives of World, alone and in two processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from sd_perf.distributed.world import World, start_world
from sd_perf.errors import ConfigError, DataError
from tests.waiting import PATIENCE

# Programs leave by os._exit: gloo's threads sometimes abort a process that ends right after its
# last collective ("terminate called without an active exception"), which is not looked at here.
COLLECTIVES = """
import json, os
from sd_perf.distributed.world import start_world, stop_world
world = start_world("cpu")
results = {
    "main": world.is_main,
    "sum": world.sum([1.0 + world.rank, 2.0**52 + 2.0 * world.rank]),
    "max": world.max(7 * world.rank),
    "gather": world.gather({"rank": world.rank}),
    "together": world.together(lambda: 10 + world.rank),
    "on_main": world.on_main(lambda: ["of", world.rank]),
}
print(json.dumps(results), flush=True)
stop_world()
os._exit(0)
"""
FAILURE = """
import os, sys
from sd_perf.distributed.world import start_world, stop_world
from sd_perf.errors import UserError
world = start_world("cpu")

def fail_on_rank_1():
    if world.rank == 1:
        raise UserError("no such file")

code = 0
try:
    world.together(fail_on_rank_1)
except UserError as error:
    print(error, flush=True)
    code = 2
except SystemExit as leaving:
    code = leaving.code
stop_world()
os._exit(code)
"""

OVERDUE = """
import os, sys, time
from pathlib import Path
from sd_perf.distributed.world import is_overdue, start_world
world, told = start_world("cpu", collective_seconds=10), Path(sys.argv[1])
if world.rank == 1:
    while not told.exists():
        time.sleep(0.02)
    os._exit(0)
try:
    world.max(0)
except RuntimeError as error:
    print(is_overdue(error), world.watchdog.lost, flush=True)
told.touch()
os._exit(0)
"""


def run_two(program: str, *arguments: object) -> list[subprocess.CompletedProcess[str]]:
    """Run a program in two processes of one world, as torchrun would."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            env={**shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    outputs = [process.communicate(timeout=PATIENCE) for process in processes]
    return [
        subprocess.CompletedProcess(process.args, process.returncode, *output)
        for process, output in zip(processes, outputs, strict=True)
    ]


def test_a_world_of_one_agrees_with_itself():
    world = World(rank=0, size=1, device=torch.device("cpu"))
    assert world.is_main and world.sum([1.5]) == [1.5] and world.max(3) == 3
    assert world.gather("x") == ["x"] and world.on_main(lambda: 4) == 4

    def fail() -> None:
        raise DataError("bad")

    with pytest.raises(DataError, match="bad"):
        world.together(fail)


def test_two_processes_agree():
    done = run_two(COLLECTIVES)
    assert [process.returncode for process in done] == [0, 0], done[0].stderr + done[1].stderr
    first, second = (json.loads(process.stdout) for process in done)
    assert (first.pop("main"), second.pop("main")) == (True, False)
    assert (first.pop("together"), second.pop("together")) == (10, 11)
    # the second sum is exact in float64, and in no smaller type
    agreed = {
        "sum": [3.0, 2.0**53 + 2.0],
        "max": 7,
        "gather": [{"rank": 0}, {"rank": 1}],
        "on_main": ["of", 0],
    }
    assert first == second == agreed


def test_when_one_rank_fails_rank_0_says_so_and_all_leave():
    first, second = run_two(FAILURE)
    assert first.returncode == second.returncode == 2, first.stderr + second.stderr
    assert first.stdout.strip() == "rank 1: no such file" and second.stdout == ""


@pytest.mark.slow
def test_a_rank_that_does_not_come_to_a_collective(tmp_path):
    first, second = run_two(OVERDUE, tmp_path / "told")
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout.strip() == "True"


def test_cuda_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"training\.device: 'cuda' cannot be used"):
        start_world("cuda")
