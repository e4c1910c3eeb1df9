"""slurm/sbatch.sh: checks what it is given, and submits a run, or an array of trials, to Slurm."""

from __future__ import annotations

import glob
import os
import platform
import re
import secrets
import sys
from dataclasses import asdict, dataclass, replace
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
from sd_perf.files import disk_errors, read_json
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
    """mounts of the container besides this folder and those of results, checkpoint and what the
    config names: FROM:TO,FROM:TO"""
    trials: int = 1
    """runs of the config with seeds that follow each other; from 2 on their logs become
    results/SYSTEM/stable_diffusion/result_*.txt below results-dir"""
    resume: Path | None = None
    """run folder of a job that has ended for good, to go on with; give the other options as before.
    One trial's goes on alone, and with --trials the array whose folders are this + _trial_N"""
    requeue_limit: int = 10
    """times that the job may be started again, after it has saved or lost a node"""
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
    if job.resume is not None:
        job = replace(job, results_dir=job.resume.parent)
    counts_gpus = check(job)
    if job.container:
        job = replace(job, mounts=all_mounts(job, preset))
    runs = resumed(job, job.resume) if job.resume else new_runs(job, preset)
    training = _training_command(job, runs, counts_gpus)
    evaluation = _evaluation_command(job, preset, runs, counts_gpus)
    how = f"in {job.container}" if job.container else "no container: tasks run in this environment"
    say(f"{runs.folder}{f', trials {runs.tasks}' if runs.tasks else ''}: {how}")
    if not counts_gpus:
        say("Slurm counts no GPUs here (no Gres=gpu): one task per --gpus-per-node")
    if dry_run:
        say(in_shell(training))
        say(in_shell(_after("JOB", runs, evaluation)) if evaluation else _NOT_EVALUATED)
        return
    with disk_errors(job.log_dir, "choose another --log-dir"):
        job.log_dir.mkdir(parents=True, exist_ok=True)
    with disk_errors(job.results_dir, "choose another --results-dir"):
        job.results_dir.mkdir(parents=True, exist_ok=True)
    call(*training[:1], "--test-only", *training[1:])
    number = call(*training).strip().partition(";")[0]
    say(f"submitted job {number}; log: {_log_file(job, runs).replace('%A', number)}")
    if evaluation:
        after = call(*_after(number, runs, evaluation)).strip().partition(";")[0]
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
    if job.trials == 1 or job.resume:
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


def all_mounts(job: Job, preset: Config) -> str:
    """The mounts that are asked for and, each at its own path, the folders of what options and
    config name, unless a mount has that place already."""
    mounts = [mount for mount in job.mounts.split(",") if mount]
    places = [Path.cwd(), *(Path(f"{mount}:{mount}".split(":")[1]) for mount in mounts)]
    values = [value for section in asdict(preset).values() for value in section.values()]
    named = [Path(value) for value in values if isinstance(value, str) and value.startswith("/")]
    named += [job.config, *([Path(job.checkpoint)] if job.checkpoint else [])]
    folders = [path if path.is_dir() else path.parent for path in named if path.exists()]
    here = {path.absolute() for path in (job.results_dir, *folders)}  # links stay links
    for folder in sorted(Path(os.path.normpath(path)) for path in here):
        if folder != Path("/") and not any(folder.is_relative_to(place) for place in places):
            mounts.append(f"{folder}:{folder}")
            places.append(folder)
    return ",".join(mounts)


@dataclass(frozen=True)
class Runs:
    """What a job makes or continues."""

    folder: Path
    """run folder; in an array each task adds _trial_N"""
    tasks: str = ""
    """numbers of the array, such as 0-9; empty: one run"""
    seed: int | None = None
    """of task 0, the others follow it; None: the config's"""


def new_runs(job: Job, preset: Config) -> Runs:
    """Runs in folders of their own, named by the time. Seeds of trials begin with the config's, or
    one drawn now."""
    folder = job.results_dir / run_name(job.config, datetime.now())
    if job.trials == 1:
        return Runs(folder)
    given = preset.training.seed
    return Runs(folder, _array(job), given if given is not None else secrets.randbits(62))


def resumed(job: Job, folder: Path) -> Runs:
    """The run, the trial or, with --trials, the array that is to go on; UserError where none is."""
    found = re.fullmatch(r"(.+)_trial_(\d+)", folder.name, re.ASCII)
    if found and job.trials > 1:
        raise UserError(
            f"--resume: {folder} is one trial; leave out --trials, or give "
            f"{folder.with_name(found[1])} for all"
        )
    array = folder.with_name(found[1]) if found else folder
    seed = first_seed(array)
    if seed is not None and (found or job.trials > 1):
        return Runs(array, found[2] if found else _array(job), seed)
    if job.trials == 1 and (folder / "run_manifest.json").is_file():
        return Runs(folder)
    if seed is not None:
        raise UserError(
            f"--resume: {folder} is an array of trials; give --trials, or {folder}_trial_N for one"
        )
    raise UserError(f"--resume: {folder} holds no run to go on with; name a run folder")


def first_seed(array: Path) -> int | None:
    """The seed of trial 0, as any trial that has begun tells it; None where none has."""
    for path in array.parent.glob(f"{glob.escape(array.name)}_trial_*/run_manifest.json"):
        number = path.parent.name.removeprefix(f"{array.name}_trial_")
        if not re.fullmatch(r"\d+", number, re.ASCII):  # a copy of the user's, say
            continue
        manifest = read_json(path)
        try:
            return int(manifest["config"]["training"]["seed"]) - int(number)
        except (TypeError, KeyError, ValueError) as error:
            raise UserError(f"{path}: does not tell the trial's seed; restore it") from error
    return None


def _array(job: Job) -> str:
    return f"0-{job.trials - 1}" if job.trials > 1 else ""


def _log_file(job: Job, runs: Runs) -> str:
    return str(job.log_dir / f"{runs.folder.name}_%A{'_%a' if runs.tasks else ''}.log")


def _sbatch(job: Job, runs: Runs) -> list[str]:
    words = ["sbatch", "--parsable", f"--output={_log_file(job, runs)}", f"--time={job.walltime}"]
    words += [f"--export=ALL,PYTHON={sys.executable}", "--requeue", "--open-mode=append"]
    words += [f"--signal=USR1@{job.signal_lead}"]
    for option in ("account", "partition", "exclude"):
        value = getattr(job, option)
        words += [f"--{option}={value}"] if value else []
    return [*words, f"--array={runs.tasks}"] if runs.tasks else words


def _training_command(job: Job, runs: Runs, counts_gpus: bool) -> list[str]:
    words = [*_sbatch(job, runs), f"--job-name={job.config.stem}", "--exclusive", "--mem=0"]
    words += [f"--nodes={job.num_nodes}", f"--ntasks-per-node={job.gpus_per_node}"]
    words += [f"--gpus-per-node={job.gpus_per_node}"] if counts_gpus else []
    words += [str(job.batch_script), "job"]
    words += ["--config", str(job.config), "--run-dir", str(runs.folder)]
    words += ["--checkpoint", job.checkpoint] if job.checkpoint else []
    words += ["--seed", str(runs.seed)] if runs.seed is not None else []
    words += ["--gpus-per-node", str(job.gpus_per_node)] if counts_gpus else []
    return words + _common_words(job)


def _evaluation_command(job: Job, preset: Config, runs: Runs, counts_gpus: bool) -> list[str]:
    """The job that scores the run; empty where the config does not say with what."""
    if not is_evaluated(preset):
        return []
    words = [*_sbatch(job, runs), f"--job-name={job.config.stem}_scores", "--nodes=1"]
    words += ["--ntasks=1", *(["--gpus-per-node=1"] if counts_gpus else [])]
    words += [str(job.batch_script), "conclude-job", str(runs.folder)]
    if runs.tasks and preset.mlperf.division != "none":
        system = re.sub(r"[^\w.-]+", "_", preset.mlperf.platform) or platform.node()
        folder = job.results_dir / "results" / system / "stable_diffusion"
        words += ["--submission", str(folder)]
    return words + _common_words(job)


def _common_words(job: Job) -> list[str]:
    words = ["--requeue-limit", str(job.requeue_limit)]
    words += ["--container", job.container] if job.container else []
    return [*words, "--mounts", job.mounts] if job.mounts else words


def _after(number: str, runs: Runs, evaluation: list[str]) -> list[str]:
    """The evaluation's command, to start when the training of the same trial has succeeded."""
    kind = "aftercorr" if runs.tasks else "afterok"
    after = [f"--dependency={kind}:{number}", "--kill-on-invalid-dep=yes"]
    return [*evaluation[:1], *after, *evaluation[1:]]
