"""One run as the benchmark's run_and_time.sh has it: drop caches, train, stop the clock, score."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sd_perf.cluster.bound import gpu_addresses
from sd_perf.cluster.commands import (
    Training,
    in_shell,
    is_evaluated,
    needs_proof,
    python_module,
    require_counts,
    require_results_dir,
    run,
    run_name,
    say,
    user_name,
)
from sd_perf.cluster.slurm import address, hosts, job_start
from sd_perf.distributed.launcher import Place, read_place
from sd_perf.errors import ConfigError, RankLostError, UserError
from sd_perf.files import read_json
from sd_perf.presets import load_preset
from sd_perf.stopping import STOPPED

BENCHMARK_CONFIG = Path("configs/train_512_moments.yaml")
SMALL_CONFIG = Path("configs/smoke.yaml")
"""taken where there is no GPU and no config is named"""
SMALL_PROCESSES = 2
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


@dataclass(frozen=True)
class TimedRun:
    """Options of run_and_time.sh."""

    num_nodes: int = 1
    """machines; under srun each task is a process of the run"""
    gpus_per_node: int | None = None
    """processes on each machine (default: its GPUs, or 2 on the CPU)"""
    checkpoint: str = ""
    """512-base-ema.ckpt: text encoder and autoencoder (default: those of the config)"""
    results_dir: Path = Path("results")
    """folder below which the run gets a folder with the time and the config's name"""
    config: Path | None = None
    """YAML preset (default: configs/train_512_moments.yaml, or configs/smoke.yaml without a GPU)"""
    run_dir: Path | None = None
    """run folder, in place of one below results-dir; a run in it is continued"""
    clear_caches: bool = True
    """drop the system's file caches first, where this user may"""


@dataclass(frozen=True)
class Plan:
    """What is run, step by step; the commands are exact."""

    training: Training
    launcher: list[str]
    """what stands before `train`"""
    clear_caches: bool
    conclude: list[str]
    """scores the run off the clock; empty where the config does not say with what"""
    where: str
    """in words"""
    nodes: int = 1
    waits: bool = False
    """whether other tasks of a step of Slurm come here, too"""

    def prove(self) -> list[str]:
        """What comes before the clock, alone; empty where the run needs no parity record."""
        words = self.training.proof()
        return python_module("sd_perf", *words) if words else []

    def train(self, caches_cleared: bool) -> list[str]:
        words = [*self.launcher, *self.training.command(caches_cleared=caches_cleared)]
        # Under srun the first task makes the record while the others wait for it.
        return [*words, "--run.join-seconds", "7200"] if self.waits and self.prove() else words


def make_plan(options: TimedRun) -> Plan:
    """Settle the options for this machine, and check them; UserError where they cannot be."""
    require_counts(options.num_nodes, 1 if options.gpus_per_node is None else options.gpus_per_node)
    gpus, place = len(gpu_addresses()), read_place()
    config = options.config or (BENCHMARK_CONFIG if gpus else SMALL_CONFIG)
    preset = load_preset(config)
    processes = options.gpus_per_node or (gpus or SMALL_PROCESSES)
    if gpus and processes > gpus:
        raise UserError(f"--gpus-per-node: {processes} cannot be used; this machine has {gpus}")
    if options.checkpoint and not Path(options.checkpoint).is_file():
        raise UserError(f"--checkpoint: {options.checkpoint}: no such file on this machine")
    require_results_dir(options.results_dir)
    inside = place.size > 1  # the shell of an allocation is none of its tasks
    if inside:
        launcher = _inside_slurm(options.num_nodes, processes, place)
    else:
        launcher = _torchrun(options.num_nodes, processes)
    now = job_start() if inside else datetime.now()
    folder = options.run_dir or options.results_dir / run_name(config, now)
    total = options.num_nodes * processes
    device = "one GPU each" if gpus else "on the CPU, since this machine has no GPU"
    conclude = python_module("sd_perf", "cluster", "conclude", str(folder))
    return Plan(
        Training(config, folder, options.checkpoint, needs_proof=needs_proof(preset)),
        launcher,
        options.clear_caches,
        conclude if is_evaluated(preset) else [],
        f"{config}, {total} process{'es' if total > 1 else ''}, {device}",
        options.num_nodes,
        waits=inside,
    )


def _torchrun(nodes: int, processes: int) -> list[str]:
    """torchrun for this machine's processes; it finds a free port where this is the only one."""
    bound = ["-m", "sd_perf.cluster.bound"]
    words = ["--nnodes", str(nodes), "--nproc-per-node", str(processes), "--max-restarts", "0"]
    if nodes == 1:
        words = ["--standalone", "--local-addr", "127.0.0.1", *words]  # its name need not resolve
        return [*python_module("sd_perf.cluster.torchrun", *words), *bound]
    missing = [key for key in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT") if key not in os.environ]
    if missing:
        raise UserError(
            f"--num-nodes: {nodes} cannot be used here; submit with slurm/sbatch.sh, or start this "
            f"on each node with {', '.join(missing)} set"
        )
    node, address, port = (os.environ[k] for k in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"))
    words += ["--node-rank", node, "--master-addr", address, "--master-port", port]
    return [*python_module("sd_perf.cluster.torchrun", *words), *bound]


def _inside_slurm(nodes: int, processes: int, place: Place) -> list[str]:
    """Each task of the step is a process of the run; the step must have as many as are asked."""
    if place.size != nodes * processes:
        raise ConfigError(
            f"--gpus-per-node: {nodes} nodes of {processes} cannot be used; srun started "
            f"{place.size} tasks; give srun as many as processes, or start this once without srun"
        )
    return python_module("sd_perf.cluster.bound")


def run_and_time(plan: Plan) -> int:
    """Carry out a plan; returns the run's exit code.

    In a step of Slurm every task comes here: the first one speaks and scores, and the first one of
    each machine drops its caches.
    """
    place = read_place()
    speaks = place.rank == 0
    if proof := plan.prove():
        code = run(proof) if speaks else 0
        if code:
            return code
    folder = plan.training.folder

    def train() -> int:
        if speaks:
            say(f"{folder}: {plan.where}")
        cleared = caches_cleared(plan, place)
        return run(plan.train(cleared), {**_environment(), **meeting_point()})

    if not speaks:
        return train()
    if code := timed(folder, train):
        again = f"; run_and_time.sh --run-dir {folder} continues it"
        say(f"exit code {code}{again if code in (STOPPED, RankLostError.exit_code) else ''}")
        return code
    if not plan.conclude:
        say("not evaluated: evaluation.prompts of the config names no file")
        return 0
    alone = {key: value for key, value in _environment().items() if not _is_of_launcher(key)}
    return run(plan.conclude, alone)


def print_plan(plan: Plan) -> None:
    """The dry run: the exact commands, for a shell."""
    say(f"{plan.training.folder}: {plan.where}")
    for command in (plan.prove(), plan.train(plan.clear_caches), plan.conclude):
        if command:
            say(in_shell(command))


def _environment() -> dict[str, str]:
    """Threads that wait for each other on shared cores are slow; nothing is downloaded in a run."""
    offline = {f"{name}_OFFLINE": "1" for name in ("HF_HUB", "HF_DATASETS", "TRANSFORMERS")}
    return {"OMP_NUM_THREADS": "1", **offline, **os.environ}


def meeting_point() -> dict[str, str]:
    """MASTER_ADDR for a task of a step of Slurm: names of nodes need not resolve."""
    nodes = os.environ.get("SLURM_STEP_NODELIST", "")
    if "RANK" in os.environ or "MASTER_ADDR" in os.environ or not nodes:
        return {}
    return {"MASTER_ADDR": address(hosts(nodes)[0])}


def _is_of_launcher(name: str) -> bool:
    return name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") or name.startswith("SLURM_")


def caches_cleared(plan: Plan, place: Place) -> bool:
    """Drop this machine's file caches where that is asked and allowed; whether the log may say so.

    It may not for several machines, since nobody here knows of the others: pre-flight of a job
    does. What a run said at its start stands in its manifest, and is said again on a resume.
    """
    recorded = recorded_clearing(plan.training.folder)
    if recorded is not None or place.local_rank:
        return bool(recorded)
    dropped, how = drop_caches() if plan.clear_caches else (False, "not asked")
    say(f"file caches {'dropped' if dropped else 'kept'} ({how})")
    return dropped and plan.nodes == 1


def recorded_clearing(folder: Path) -> bool | None:
    """What the run in a folder was told of caches when it began; None where there is no run."""
    manifest = read_json(folder / "run_manifest.json")
    try:
        return bool(manifest["config"]["mlperf"]["caches_cleared"])
    except (TypeError, KeyError):  # no run, or one that `train` will refuse with a sentence
        return None


def drop_caches() -> tuple[bool, str]:
    """Write dirty pages and drop the system's file caches; (whether it worked, how or why not)."""
    os.sync()
    if os.geteuid() == 0:
        try:
            DROP_CACHES.write_text("3\n")
        except OSError as error:
            return False, f"{DROP_CACHES}: {error.strerror}"
        return True, "as root"
    fault = _call(["sudo", "-n", "sh", "-c", f"echo 3 > {DROP_CACHES}"])
    return (False, fault) if fault else (True, "by sudo -n")


def _call(command: list[str]) -> str:
    """Run a command; empty where it worked, else why not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not root, and {command[0]}: {getattr(error, 'strerror', None) or 'takes too long'}"
    if done.returncode == 0:
        return ""
    return " ".join(done.stderr.split()) or f"{command[0]} ended with {done.returncode}"


def timed(folder: Path, train: Callable[[], int]) -> int:
    """Train between the benchmark's lines, with its result where it ends well; the exit code."""
    before, start = position(folder), time.time()
    say(f"STARTING TIMING RUN AT {in_words(start)}")
    code, end = train(), time.time()
    say(f"ENDING TIMING RUN AT {in_words(end)}")
    if not code and 0 < position(folder) == before:
        # Its time would be that since a run that ended long ago was begun.
        say(f"{folder}: nothing was left to train; RESULT was told where the run ended")
    elif not code:
        start = first_start(folder, start)
        say(f"RESULT,stable_diffusion,{end - start:.0f},{user_name()},{in_words(start)}")
    return code


def position(folder: Path) -> int:
    """Samples of the newest complete checkpoint in a run folder; 0 where there is none.

    The names alone: see sd_perf.runs.checkpoints, which needs torch.
    """
    names = [path.name for path in folder.glob("checkpoints/samples_*")]
    found = [re.fullmatch(r"samples_([0-9]+)", name) for name in names]
    return max((int(name[1]) for name in found if name), default=0)


def first_start(folder: Path, now: float) -> float:
    """When the run in a folder was first started, seconds since 1970; `now` where nothing says."""
    manifest = read_json(folder / "run_manifest.json")
    try:
        return min(now, datetime.fromisoformat(manifest["starts"][0]["time"]).timestamp())
    except (TypeError, KeyError, IndexError, ValueError):
        return now


def in_words(seconds: float) -> str:
    """A time as the benchmark prints it: 2024-05-01 12:00:00 PM."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %I:%M:%S %p")
