"""slurm/sbatch.sh: checks what it is given, and submits a run, or an array of trials, to Slurm."""

from __future__ import annotations

import os
import platform
import re
import secrets
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from sd_perf.cluster.commands import (
    in_shell,
    is_evaluated,
    require_between,
    require_counts,
    require_results_dir,
    run_name,
    say,
)
from sd_perf.cluster.slurm import (
    Node,
    call,
    default_partition,
    in_container,
    nodes,
    seconds_of,
    time_limit,
)
from sd_perf.config import Config
from sd_perf.errors import UserError
from sd_perf.files import disk_errors
from sd_perf.presets import load_preset

MAX_TRIALS = 1000
LOCAL_DISKS = ("tmpfs", "ramfs", "overlay", "squashfs")
"""file systems that no other machine can see"""


@dataclass(frozen=True)
class Job:
    """Options of slurm/sbatch.sh."""

    account: str = ""
    """account to charge"""
    partition: str = ""
    """partition (default: the cluster's)"""
    num_nodes: int = 8
    """machines"""
    gpus_per_node: int = 8
    """GPUs, and processes, on each"""
    walltime: str = "04:00:00"
    """time limit of each start of the job, hours:minutes:seconds"""
    config: Path = Path("configs/train_512_moments.yaml")
    """YAML preset"""
    checkpoint: str = ""
    """512-base-ema.ckpt: text encoder and autoencoder (default: those of the config)"""
    log_dir: Path = Path("nogit/logs")
    """folder of the jobs' output"""
    results_dir: Path = Path("/results")
    """folder, shared by all nodes, below which each run gets its own"""
    container: str = ""
    """image to run in, by pyxis or apptainer"""
    mounts: str = ""
    """further mounts of the container, FROM:TO,FROM:TO"""
    trials: int = 1
    """runs of the config with seeds that follow each other; from 2 on their logs become
    results/SYSTEM/stable_diffusion/result_*.txt below results-dir"""
    requeue_limit: int = 10
    """times that Slurm is asked to start the job again after it has saved"""
    signal_lead: int = 300
    """seconds before the time limit at which the run is told to save"""
    exclude: str = ""
    """nodes to do without"""
    batch_script: Path = Path(__file__).parents[2] / "slurm/srun.sh"
    """the script to submit"""


def submit(job: Job, *, dry_run: bool) -> None:
    """Submit the run and its evaluation, or print the commands that would. UserError before
    anything is submitted where an option cannot be used."""
    preset = load_preset(job.config)
    counts_gpus = check(job)
    name = run_name(job.config, datetime.now())
    seed = trial_seed(preset) if job.trials > 1 else None
    training = _training_command(job, name, seed, counts_gpus)
    evaluation = _evaluation_command(job, preset, name, counts_gpus)
    how = f"in {job.container}" if job.container else "no container: tasks run in this environment"
    say(f"{job.results_dir / name}: {how}")
    if not counts_gpus:
        say("Slurm counts no GPUs here (no Gres=gpu): one task per --gpus-per-node")
    if dry_run:
        say(in_shell(training))
        say(in_shell(_after("JOB", job, evaluation)) if evaluation else _NOT_EVALUATED)
        return
    with disk_errors(job.log_dir, "choose another --log-dir"):
        job.log_dir.mkdir(parents=True, exist_ok=True)
    with disk_errors(job.results_dir, "choose another --results-dir"):
        job.results_dir.mkdir(parents=True, exist_ok=True)
    call(*training[:1], "--test-only", *training[1:])
    number = call(*training).strip().partition(";")[0]
    say(f"submitted job {number}; log: {_log_file(job, name).replace('%A', number)}")
    if evaluation:
        after = call(*_after(number, job, evaluation)).strip().partition(";")[0]
        say(f"submitted job {after}, which evaluates it")
    else:
        say(_NOT_EVALUATED)


_NOT_EVALUATED = "not evaluated: evaluation.prompts of the config names no file"


def check(job: Job) -> bool:
    """UserError for options that cannot be; returns whether Slurm counts the cluster's GPUs."""
    require_counts(job.num_nodes, job.gpus_per_node)
    require_between("--trials", job.trials, 1, MAX_TRIALS)
    require_between("--requeue-limit", job.requeue_limit, 0, 10_000)
    require_between("--signal-lead", job.signal_lead, 10, 24 * 3600)
    seconds = seconds_of(job.walltime)
    if seconds <= job.signal_lead:
        raise UserError(
            f"--walltime: {job.walltime} is {seconds:,} s, and the run is told to save "
            f"{job.signal_lead:,} s before its end; give it more time, or a smaller --signal-lead"
        )
    if not job.batch_script.is_file():
        raise UserError(f"{job.batch_script}: no such batch script; it comes with the sources")
    if job.checkpoint and not job.container and not Path(job.checkpoint).is_file():
        raise UserError(f"--checkpoint: {job.checkpoint}: no such file on this machine")
    if job.container.startswith(("/", ".")) and not Path(job.container).exists():
        raise UserError(f"--container: {job.container}: no such image")
    in_container(job.container, job.mounts, Path.cwd())
    require_results_dir(job.results_dir)
    _require_no_trials(job)
    there = _partition_nodes(job)
    _require_shared(job, there)
    limit = time_limit(job.partition or default_partition())
    if limit is not None and seconds > limit:
        raise UserError(f"--walltime: {job.walltime} is more than the partition's {limit:,} s")
    return _require_nodes(job, there)


def _partition_nodes(job: Job) -> list[Node]:
    name, every = job.partition or default_partition(), nodes()
    there = [node for node in every if not name or name in node.partitions]
    if not there:
        names = sorted({part for node in every for part in node.partitions if part})
        raise UserError(
            f"--partition: {job.partition!r} has no nodes; this cluster has {', '.join(names)}"
        )
    return there


def _require_nodes(job: Job, there: list[Node]) -> bool:
    """UserError where the partition has too few nodes of that kind; whether GPUs are counted."""
    if job.num_nodes > len(there):
        raise UserError(
            f"--num-nodes: {job.num_nodes} cannot be used; the partition has {len(there)} nodes"
        )
    counts_gpus = any(node.gpus for node in there)
    fit = [node for node in there if node.gpus >= job.gpus_per_node]
    if counts_gpus and len(fit) < job.num_nodes:
        kinds = ", ".join(
            f"{sum(node.gpus == gpus for node in there)} of {gpus}"
            for gpus in sorted({node.gpus for node in there}, reverse=True)
        )
        raise UserError(
            f"--gpus-per-node: {job.num_nodes} nodes of {job.gpus_per_node} GPUs cannot be had; "
            f"the partition's nodes, by GPUs, are {kinds}"
        )
    return counts_gpus


def _require_no_trials(job: Job) -> None:
    if job.trials == 1:
        return
    earlier = sorted([*job.results_dir.glob("*_trial_*"), *job.results_dir.glob("results/*/*")])
    if earlier:
        raise UserError(
            f"--results-dir: {job.results_dir} holds trials already ({earlier[0].name}); give each "
            "set of trials a folder of its own"
        )


def _require_shared(job: Job, there: list[Node]) -> None:
    """UserError for a folder that other machines cannot see. Pre-flight finds out what is left."""
    here = platform.node()
    if all(node.host.split(".")[0] == here.split(".")[0] for node in there):
        return
    for option, folder in (("--results-dir", job.results_dir), ("--log-dir", job.log_dir)):
        kind = file_system(folder, Path("/proc/mounts").read_text())
        if kind in LOCAL_DISKS:
            raise UserError(
                f"{option}: {folder} is on a {kind} of {here} alone; give a folder that all nodes "
                "share"
            )


def file_system(folder: Path, mounts: str) -> str:
    """Kind of the file system that a folder is on, or would be, by the lines of /proc/mounts."""
    path = Path(os.path.realpath(folder))
    found = {
        Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), fields[1])): fields[2]
        for fields in map(str.split, mounts.splitlines())
    }
    return next(found[parent] for parent in (path, *path.parents) if parent in found)


def trial_seed(preset: Config) -> int:
    """The seed of the first trial; the others follow it. The config's, or one drawn now."""
    given = preset.training.seed
    return given if given is not None else secrets.randbits(62)


def _log_file(job: Job, name: str) -> str:
    return str(job.log_dir / f"{name}_%A{'_%a' if job.trials > 1 else ''}.log")


def _sbatch(job: Job, name: str) -> list[str]:
    words = ["sbatch", "--parsable", f"--output={_log_file(job, name)}", f"--time={job.walltime}"]
    words += [f"--export=ALL,PYTHON={sys.executable}", "--requeue", "--open-mode=append"]
    for option in ("account", "partition", "exclude"):
        value = getattr(job, option)
        words += [f"--{option}={value}"] if value else []
    return [*words, f"--array=0-{job.trials - 1}"] if job.trials > 1 else words


def _training_command(job: Job, name: str, seed: int | None, counts_gpus: bool) -> list[str]:
    words = [*_sbatch(job, name), f"--job-name={job.config.stem}", "--exclusive", "--mem=0"]
    words += [f"--nodes={job.num_nodes}", f"--ntasks-per-node={job.gpus_per_node}"]
    words += [f"--gpus-per-node={job.gpus_per_node}"] if counts_gpus else []
    words += [f"--signal=USR1@{job.signal_lead}", str(job.batch_script), "job"]
    words += ["--config", str(job.config), "--run-dir", str(job.results_dir / name)]
    words += ["--requeue-limit", str(job.requeue_limit)]
    words += ["--checkpoint", job.checkpoint] if job.checkpoint else []
    words += ["--seed", str(seed)] if seed is not None else []
    words += ["--gpus-per-node", str(job.gpus_per_node)] if counts_gpus else []
    return words + _container_words(job)


def _evaluation_command(job: Job, preset: Config, name: str, counts_gpus: bool) -> list[str]:
    """The job that scores the run; empty where the config does not say with what."""
    if not is_evaluated(preset):
        return []
    words = [*_sbatch(job, name), f"--job-name={job.config.stem}_scores", "--nodes=1"]
    words += ["--ntasks=1", *(["--gpus-per-node=1"] if counts_gpus else [])]
    words += [str(job.batch_script), "conclude-job", str(job.results_dir / name)]
    if job.trials > 1 and preset.mlperf.division != "none":
        system = re.sub(r"[^\w.-]+", "_", preset.mlperf.platform) or platform.node()
        folder = job.results_dir / "results" / system / "stable_diffusion"
        words += ["--submission", str(folder)]
    return words + _container_words(job)


def _container_words(job: Job) -> list[str]:
    words = ["--container", job.container] if job.container else []
    return [*words, "--mounts", job.mounts] if job.mounts else words


def _after(number: str, job: Job, evaluation: list[str]) -> list[str]:
    """The evaluation's command, to start when the training of the same trial has succeeded."""
    kind = "aftercorr" if job.trials > 1 else "afterok"
    after = [f"--dependency={kind}:{number}", "--kill-on-invalid-dep=yes"]
    return [*evaluation[:1], *after, *evaluation[1:]]
