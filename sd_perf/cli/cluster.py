"""`sd-perf cluster`: what the benchmark's scripts call."""

from __future__ import annotations

from pathlib import Path

from sd_perf.cli.console import print_plain
from sd_perf.cli.options import RunFolder, Settings, require_between

_ROOT = Path(__file__).parents[2]


def run(
    num_nodes: int = 1,
    gpus_per_node: int | None = None,
    checkpoint: str = "",
    results_dir: Path = Path("results"),
    config: Path | None = None,
    run_dir: Path | None = None,
    clear_caches: bool = True,
    dry_run: bool = False,
) -> int:
    """Train and score one run, timed: run_and_time.sh. Ends with the run's exit code.

    Args:
        num_nodes: machines; under srun each task is a process of the run
        gpus_per_node: processes on each machine (default: its GPUs, or 2 on the CPU)
        checkpoint: 512-base-ema.ckpt: text encoder and autoencoder (default: those of the config)
        results_dir: folder below which the run gets a folder with the time and the config's name
        config: YAML preset (default: configs/train_512_moments.yaml, or configs/smoke.yaml where
            there is no GPU)
        run_dir: run folder, in place of one below results-dir; a run in it is continued
        clear_caches: drop the system's file caches first, where this user may
        dry_run: print the exact commands, and exit
    """
    from sd_perf.cluster.commands import in_shell, say
    from sd_perf.cluster.timed_run import TimedRun, make_plan, run_and_time

    require_between("--num-nodes", num_nodes, 1, 100_000)
    if gpus_per_node is not None:
        require_between("--gpus-per-node", gpus_per_node, 1, 1000)
    options = TimedRun(
        num_nodes, gpus_per_node, checkpoint, results_dir, config, run_dir, clear_caches
    )
    plan = make_plan(options)
    if not dry_run:
        return run_and_time(plan)
    say(f"{plan.training.folder}: {plan.where}")
    if proof := plan.prove():
        say(in_shell(proof))
    say(in_shell(plan.train(caches_cleared=clear_caches)))
    say(in_shell(plan.conclude) if plan.conclude else "not evaluated: no evaluation.prompts")
    return 0


def submit(
    account: str = "",
    partition: str = "",
    num_nodes: int = 8,
    gpus_per_node: int = 8,
    walltime: str = "04:00:00",
    config: Path = Path("configs/train_512_moments.yaml"),
    checkpoint: str = "",
    log_dir: Path = Path("nogit/logs"),
    results_dir: Path = Path("/results"),
    container: str = "",
    mounts: str = "",
    trials: int = 1,
    requeue_limit: int = 10,
    signal_lead: int = 300,
    exclude: str = "",
    dry_run: bool = False,
    batch_script: Path = _ROOT / "slurm/srun.sh",
) -> int:
    """Submit a run to Slurm, and its evaluation after it: slurm/sbatch.sh.

    Args:
        account: account to charge
        partition: partition (default: the cluster's)
        num_nodes: machines
        gpus_per_node: GPUs, and processes, on each
        walltime: time limit of each start of the job, hours:minutes:seconds
        config: YAML preset
        checkpoint: 512-base-ema.ckpt: text encoder and autoencoder (default: those of the config)
        log_dir: folder of the jobs' output
        results_dir: folder, shared by all nodes, below which each run gets its own
        container: image to run in, by pyxis or apptainer
        mounts: further mounts of the container, FROM:TO,FROM:TO
        trials: runs of the same config with seeds that follow each other; from 2 on their logs
            become results/SYSTEM/stable_diffusion/result_*.txt below results-dir
        requeue_limit: times that Slurm is asked to start the job again after it has saved
        signal_lead: seconds before the time limit at which the run is told to save
        exclude: nodes to do without
        dry_run: print the exact commands, and submit nothing
        batch_script: the script to submit
    """
    from sd_perf.cluster.submit import Job
    from sd_perf.cluster.submit import submit as submit_job

    job = Job(
        account,
        partition,
        num_nodes,
        gpus_per_node,
        walltime,
        config,
        checkpoint,
        log_dir,
        results_dir,
        container,
        mounts,
        trials,
        requeue_limit,
        signal_lead,
        exclude,
        batch_script,
    )
    submit_job(job, dry_run=dry_run)
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
    from sd_perf.cluster.commands import Training, needs_proof
    from sd_perf.cluster.job import JobRun, run_job
    from sd_perf.presets import load_preset

    training = Training(config, run_dir, checkpoint, seed, needs_proof(load_preset(config)))
    return run_job(JobRun(training, gpus_per_node, requeue_limit, container, mounts))


def conclude_job(
    run: RunFolder, submission: Path | None = None, container: str = "", mounts: str = ""
) -> int:
    """The job of Slurm that follows a run: evaluation and verdict (slurm/srun.sh).

    Args:
        run: run folder; in an array each task adds its number
        submission: folder for the logs of an array, result_*.txt
        container: image to run in
        mounts: further mounts of the container
    """
    from sd_perf.cluster.commands import Training
    from sd_perf.cluster.job import JobRun
    from sd_perf.cluster.job import conclude_job as conclude

    return conclude(JobRun(Training(Path(), run), 0, 0, container, mounts), submission)


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
