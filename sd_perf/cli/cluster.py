"""`sd-perf cluster`: what the benchmark's scripts call."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from sd_perf.cli.console import print_plain
from sd_perf.cli.options import RunFolder, Settings
from sd_perf.cluster.commands import Training, needs_proof
from sd_perf.cluster.job import JobRun, run_job
from sd_perf.cluster.job import conclude_job as conclude_job_of
from sd_perf.cluster.submit import Job
from sd_perf.cluster.submit import submit as submit_job
from sd_perf.cluster.timed_run import TimedRun, make_plan, print_plan, run_and_time
from sd_perf.presets import load_preset


def run(options: Annotated[TimedRun, tyro.conf.arg(name="")], dry_run: bool = False) -> int:
    """Train and score one run, timed: run_and_time.sh. Ends with the run's exit code.

    Args:
        options: of the script
        dry_run: print the exact commands, and exit
    """
    plan = make_plan(options)
    if not dry_run:
        return run_and_time(plan)
    print_plan(plan)
    return 0


def submit(options: Annotated[Job, tyro.conf.arg(name="")], dry_run: bool = False) -> int:
    """Submit a run to Slurm, and its evaluation after it: slurm/sbatch.sh.

    Args:
        options: of the script
        dry_run: print the exact commands, and submit nothing
    """
    submit_job(options, dry_run=dry_run)
    return 0


def job(
    config: Path,
    run_dir: Path,
    checkpoint: str = "",
    seed: int | None = None,
    gpus_per_node: int = 0,
    requeue_limit: int = 10,
    container: str = "",
    mounts: str = "",
) -> int:
    """One start of a job of Slurm: pre-flight, training, and what follows (slurm/srun.sh).

    Args:
        config: YAML preset
        run_dir: run folder; in an array each task adds its number
        checkpoint: file of text encoder and autoencoder (default: those of the config)
        seed: of the first task of an array (default: the config's)
        gpus_per_node: GPUs that each node must have (0: not looked at)
        requeue_limit: times that Slurm is asked to start the job again
        container: image to run in
        mounts: further mounts of the container
    """
    training = Training(config, run_dir, checkpoint, seed, needs_proof(load_preset(config)))
    return run_job(JobRun(training, gpus_per_node, requeue_limit, container, mounts))


def conclude_job(
    run: RunFolder,
    submission: Path | None = None,
    requeue_limit: int = 10,
    container: str = "",
    mounts: str = "",
) -> int:
    """The job of Slurm that follows a run: evaluation and verdict (slurm/srun.sh).

    Args:
        run: run folder; in an array each task adds its number
        submission: folder for the logs of an array, result_*.txt
        requeue_limit: times that Slurm is asked to start the job again
        container: image to run in
        mounts: further mounts of the container
    """
    job = JobRun(Training(Path(), run), 0, requeue_limit, container, mounts)
    return conclude_job_of(job, submission)


def preflight(
    config: Path,
    settings: Settings,
    report: Path,
    gpus_per_node: int = 0,
    clear_caches: bool = False,
) -> int:
    """Look at every node before a run: one process per process of the run, started as it will be.

    Compares GPUs, free memory, versions, files, clocks and the folder of results, and times an
    all_reduce; exits with 2 and the names of the nodes that are unfit.

    Args:
        config: YAML preset
        settings: fields of the preset
        report: file to write what was found to, in the folder of results
        gpus_per_node: GPUs that each node must have (0: not looked at)
        clear_caches: drop the system's file caches on every node, where this user may
    """
    from sd_perf.cluster.preflight import look

    print_plain(look(settings, report, gpus_per_node, clear_caches))
    return 0


def prove(config: Path, settings: Settings) -> int:
    """Run `sd-perf parity`, unless a green record of this config, code and device stands.

    Args:
        config: YAML preset
        settings: fields of the preset; the record's folder is run.dir + .parity
    """
    from sd_perf.cli.tools import parity
    from sd_perf.errors import ConfigError
    from sd_perf.runs.parity_record import require_green

    try:
        require_green(settings)
    except ConfigError:
        return parity(config, settings)
    return 0


def conclude(run: RunFolder, submission: Path | None = None) -> int:
    """Evaluate a run, then print the checker's verdict on its log and its score.

    Args:
        run: run folder
        submission: where a copy of its log goes, such as .../stable_diffusion/result_3.txt
    """
    from sd_perf.cli.evaluation import evaluate
    from sd_perf.cluster.conclude import conclude as conclude_run

    evaluate(run)
    return conclude_run(run, submission)
