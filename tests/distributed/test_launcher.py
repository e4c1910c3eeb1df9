"""What torchrun and Slurm say of a process, and what cannot be."""

from __future__ import annotations

import pytest

from sd_perf.distributed.launcher import Place, read_place
from sd_perf.errors import ConfigError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "one",
    "MASTER_PORT": "29500",
}
ALLOCATION = {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "n[1-2]"}
BATCH_SCRIPT = {**ALLOCATION, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
TASK = {
    **ALLOCATION,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}


def test_torchrun():
    assert read_place(TORCHRUN) == Place(5, 8, 1, "one", 29500)
    assert read_place({**TASK, **TORCHRUN}) == Place(5, 8, 1, "one", 29500)
    assert read_place({"WORLD_SIZE": "1"}) == read_place({}) == Place()


@pytest.mark.parametrize(
    "environment",
    [ALLOCATION, BATCH_SCRIPT, {**TASK, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}],
    ids=["salloc", "sbatch", "a step of one task"],
)
def test_no_task_of_a_step_of_several(environment):
    assert read_place({**environment, "SLURM_LOCALID": "0"}) == Place()


def test_a_task_of_a_step():
    place = read_place(TASK)
    assert (place.rank, place.size, place.local_rank, place.address) == (3, 4, 1, "n1")
    ports = {
        read_place({**TASK, name: number}).port
        for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        for number in ("1", "2", "3")
    }
    assert len(ports) == 9 and all(20_000 <= port < 32_000 for port in ports)
    assert read_place({**TASK, "SLURM_PROCID": "0"}).port == place.port
    named = read_place({**TASK, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "77"})
    assert (named.address, named.port) == ("10.0.0.1", 77)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n7", "n7"),
        ("n[01-12,40]", "n01"),
        ("gpu-a[3,5-6].site,other[1-2]", "gpu-a3.site"),
        ("rack[1-2]node[09-10]", "rack1node09"),
        ("a,b", "a"),
    ],
)
def test_the_first_host(nodes, first):
    assert read_place({**TASK, "SLURM_STEP_NODELIST": nodes}).address == first


def test_one_machine_needs_no_name():
    place = read_place({**TASK, "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NODELIST": "x"})
    assert place.address == "127.0.0.1"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"RANK": "abc"}, "RANK: 'abc' cannot be used; it must be a whole number from 0 to 7"),
        ({"RANK": "8"}, "RANK: '8' cannot be used; it must be a whole number from 0 to 7"),
        ({"RANK": "-1"}, "RANK: '-1'"),
        ({"RANK": "٣"}, "RANK: '٣'"),
        ({"RANK": None}, "RANK: is not set, and other variables of a launcher are"),
        ({"WORLD_SIZE": None}, "WORLD_SIZE: is not set"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE: '0' cannot be used"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE: '9"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK: ''"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR: is not set"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT: '70000'"),
    ],
)
def test_what_cannot_be(changes, told):
    changed = {key: value for key, value in {**TORCHRUN, **changes}.items() if value is not None}
    with pytest.raises(ConfigError) as refused:
        read_place(changed)
    assert str(refused.value).startswith(told)


@pytest.mark.parametrize("nodes", ["", "[", "(null)", "n[1-"])
def test_a_list_that_tells_no_host(nodes):
    with pytest.raises(ConfigError, match="set MASTER_ADDR"):
        read_place({**TASK, "SLURM_STEP_NODELIST": nodes, "SLURM_JOB_NODELIST": ""})
