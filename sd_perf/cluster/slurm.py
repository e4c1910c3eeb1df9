"""What Slurm says: nodes, jobs, containers. Every call is one of its own commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sd_perf.errors import UserError
from sd_perf.files import quoted

_SECONDS = 120
"""for one answer of Slurm"""


@dataclass(frozen=True)
class Node:
    """A node of the cluster, by `scontrol show node`."""

    name: str
    address: str
    host: str
    """name that the machine gives itself"""
    gpus: int
    partitions: tuple[str, ...]


def call(*command: str) -> str:
    """What a command of Slurm prints; UserError with its complaint where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except FileNotFoundError as error:
        raise UserError(
            f"{command[0]}: is not on PATH; submit from a machine of a Slurm cluster, or use "
            "run_and_time.sh without Slurm"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"{command[0]}: no answer of Slurm's controller; see scontrol ping"
        ) from error
    if done.returncode:
        lines = [line.split("error: ")[-1].strip() for line in done.stderr.splitlines() if line]
        told = "; ".join(dict.fromkeys(lines)) or f"ended with {done.returncode}"
        raise UserError(f"{command[0]}: {told}")
    return done.stdout


def nodes() -> list[Node]:
    """All nodes that the cluster has, whatever state they are in."""
    return [_node(line) for line in call("scontrol", "show", "node", "--oneliner").splitlines()]


def _node(line: str) -> Node:
    def field(name: str) -> str:
        found = re.search(rf"(?:^|\s){name}=(\S+)", line)
        return found[1] if found else ""

    gpus = re.findall(r"gpu:(?:[\w.-]+:)?(\d+)", field("Gres"))
    name = field("NodeName")
    return Node(
        name,
        field("NodeAddr") or name,
        field("NodeHostName") or name,
        sum(map(int, gpus)),
        tuple(field("Partitions").split(",")),
    )


def default_partition() -> str:
    """The partition of jobs that name none; empty where the cluster has no default."""
    names = call("sinfo", "--noheader", "--format", "%P").split()
    return next((name[:-1] for name in names if name.endswith("*")), "")


def time_limit(partition: str) -> int | None:
    """The longest time that a partition gives a job, seconds; None where it has no limit."""
    told = call("sinfo", "--noheader", "--format", "%l", "--partition", partition).split()
    return seconds_of(told[0]) if told and told[0] != "infinite" else None


def hosts(node_list: str) -> list[str]:
    """The node names in a list such as rack[1-2,7]."""
    return call("scontrol", "show", "hostnames", node_list).split()


def address(name: str) -> str:
    """Where a node is reached. Its name need not resolve."""
    return _node(call("scontrol", "show", "node", name, "--oneliner")).address


def job_field(job: str, name: str) -> str:
    """A field of `scontrol show job`, such as JobState; empty where it is missing."""
    found = re.search(rf"\b{name}=(\S+)", call("scontrol", "show", "job", job, "--oneliner"))
    return found[1] if found else ""


def job_start() -> datetime:
    """When the job of this process began: the same for all its tasks."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        raise UserError("SLURM_JOB_ID: is not set, and other variables of Slurm are; use srun")
    return datetime.fromisoformat(job_field(job, "StartTime"))


def seconds_of(walltime: str) -> int:
    """Seconds of a time limit as sbatch takes it: minutes, m:s, h:m:s, days-h, d-h:m, d-h:m:s."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", walltime, re.ASCII)
    if not found:
        raise UserError(
            f"--walltime: {quoted(walltime)} cannot be used; it must be hours:minutes:seconds, "
            "such as 04:00:00"
        )
    days, *parts = found.groups()
    first, second, third = (int(part or 0) for part in parts)
    if days is not None:
        return ((int(days) * 24 + first) * 60 + second) * 60 + third
    given = sum(part is not None for part in parts)
    return [first * 60, first * 60 + second, (first * 60 + second) * 60 + third][given - 1]


def container_runtime() -> str:
    """`pyxis` where srun takes --container-image, else `apptainer` where that is, else ""."""
    if "--container-image" in call("srun", "--help"):
        return "pyxis"
    return next((name for name in ("apptainer", "singularity") if shutil.which(name)), "")


def in_container(image: str, mounts: str, workdir: Path) -> tuple[list[str], list[str]]:
    """Options of srun, and the words before a command, that run it in a container.

    Both are empty without an image. UserError where nothing here can start containers.
    """
    if not image:
        return [], []
    runtime = container_runtime()
    bound = [f"{workdir}:{workdir}", *filter(None, mounts.split(","))]
    if runtime == "pyxis":
        options = [f"--container-image={image}", f"--container-mounts={','.join(bound)}"]
        return [*options, f"--container-workdir={workdir}"], []
    if runtime:
        binds = [word for mount in bound for word in ("--bind", mount)]
        return [], [runtime, "exec", "--nv", *binds, "--pwd", str(workdir), image]
    raise UserError(
        f"--container: {image} cannot be started; srun here knows no --container-image (pyxis), "
        "and neither apptainer nor singularity is on PATH"
    )
