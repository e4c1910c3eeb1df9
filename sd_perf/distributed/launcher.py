"""Which process of a run this is: what torchrun or Slurm says in environment variables."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from sd_perf.errors import ConfigError

MAX_RANKS = 100_000
_PORTS = range(20_000, 32_000)
"""ports that a Slurm step derives its own from: below those that Linux gives to connections"""
_START = "start the processes with torchrun or srun, which set it"


@dataclass(frozen=True)
class Place:
    """This process among those of the run, and where they meet."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """among the processes on this machine"""
    address: str = ""
    """host name or IP address of rank 0; empty in a run of one process"""
    port: int = 0


def read_place(environment: Mapping[str, str] = os.environ) -> Place:
    """The place that the launcher gave this process; ConfigError for variables that cannot be.

    torchrun says it by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Where neither of
    the first two is set, a task of a Slurm step of several tasks takes Slurm's own variables. The
    shell of an allocation is no task of a step, whatever SLURM_NTASKS says.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        place = _of_torchrun(environment)
    elif {"SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"} <= environment.keys():
        place = _of_slurm(environment)
    else:
        return Place()
    return place if place.size > 1 else Place()


def _of_torchrun(environment: Mapping[str, str]) -> Place:
    size = _number(environment, "WORLD_SIZE", range(1, MAX_RANKS + 1))
    if size == 1 and "RANK" not in environment:
        return Place()
    rank = _number(environment, "RANK", range(size))
    local = _number(environment, "LOCAL_RANK", range(size)) if "LOCAL_RANK" in environment else 0
    if size == 1:
        return Place()
    if not environment.get("MASTER_ADDR"):
        raise ConfigError(f"MASTER_ADDR: is not set and WORLD_SIZE is {size}; {_START}")
    port = _number(environment, "MASTER_PORT", range(1, 2**16))
    return Place(rank, size, local, environment["MASTER_ADDR"], port)


def _of_slurm(environment: Mapping[str, str]) -> Place:
    """A task of a Slurm step (srun's manual page, "OUTPUT ENVIRONMENT VARIABLES")."""
    size = _number(environment, "SLURM_STEP_NUM_TASKS", range(1, MAX_RANKS + 1))
    rank = _number(environment, "SLURM_PROCID", range(size))
    local = _number(environment, "SLURM_LOCALID", range(size))
    if size == 1:
        return Place()
    address = environment.get("MASTER_ADDR") or _first_host(environment)
    if "MASTER_PORT" in environment:
        port = _number(environment, "MASTER_PORT", range(1, 2**16))
    else:
        # Steps of a job, and jobs that share a machine, get ports of their own; so does a restart.
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        job, step, restart = (_number(environment, name, range(2**32), "0") for name in names)
        port = _PORTS[(101 * job + step + 11 * restart) % len(_PORTS)]
    return Place(rank, size, local, address, port)


def _first_host(environment: Mapping[str, str]) -> str:
    """The host of rank 0: the first in the list of the step's, such as rack[1-2,7]node3,other."""
    if environment.get("SLURM_STEP_NUM_NODES") == "1":
        return "127.0.0.1"
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    hosts = re.fullmatch(r"((?:[^\[\],]|\[[^\]]*\])*)(?:,.*)?", nodes)
    first = re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", hosts[1] if hosts else "")
    if not re.fullmatch(r"[\w.-]+", first):
        raise ConfigError(
            f"SLURM_STEP_NODELIST: {nodes!r} does not tell the host of rank 0; set MASTER_ADDR"
        )
    return first


def _number(
    environment: Mapping[str, str], name: str, allowed: range, default: str | None = None
) -> int:
    text = environment.get(name, default)
    if text is None:
        raise ConfigError(f"{name}: is not set, and other variables of a launcher are; {_START}")
    if not re.fullmatch(r"\d{1,10}", text, re.ASCII) or int(text) not in allowed:
        raise ConfigError(
            f"{name}: {text!r} cannot be used; it must be a whole number from {allowed[0]} to "
            f"{allowed[-1]}, as torchrun and srun set it"
        )
    return int(text)
