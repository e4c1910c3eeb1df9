"""The batch script of a job of Slurm, slurm/srun.sh: look at the nodes, train, and requeue or end.

It runs once per start of the job, on its first node. The signal that comes before the time limit
goes to the tasks alone (sbatch --signal without B:): they save and leave with 75, and srun, which
this process waits for, tells.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from sd_perf.cluster.commands import Training, run, say
from sd_perf.cluster.slurm import address, call, hosts, in_container, job_field
from sd_perf.cluster.timed_run import position, recorded_clearing, timed
from sd_perf.errors import RankLostError, UserError
from sd_perf.files import read_json
from sd_perf.stopping import CTRL_C, STOP, STOPPED

BAD_INPUT, LOST = UserError.exit_code, RankLostError.exit_code
_SIGNALLED = 128
_LAST_TASK_WAIT = 600
"""seconds that srun waits for its other tasks after the first has left; a node that is down is
noticed in less"""
_ONWARD = "slurm/sbatch.sh --resume with the run's folder goes on with it"
_LEFT_ALONE = {
    "COMPLETING": "Slurm has ended it, and requeues it by itself where a node has failed",
    "PENDING": "Slurm requeues it by itself",
    "TIMEOUT": "not requeued, it had not saved when its time was over; give it a longer "
    f"--signal-lead, then {_ONWARD}",
}
"""what becomes of a job in such a state, which this script does not requeue"""


@dataclass(frozen=True)
class JobRun:
    """What slurm/srun.sh is told."""

    training: Training
    gpus_per_node: int
    """0: Slurm counts none, and tasks run on CPUs or on what they find"""
    requeue_limit: int
    container: str
    mounts: str


def run_job(job: JobRun) -> int:
    """One start of the job; returns its exit code. Where the job is requeued, Slurm ends it."""
    return _begin(job, _run)


def _run(job: JobRun) -> int:
    restarts, number = _restarts(), _job_id()
    folder = job.training.folder
    before, where = position(folder), os.environ.get("SLURM_JOB_NODELIST", "?")
    say(f"job {number}, start {restarts + 1}, on {where}: {folder} at {before:,} samples")
    with _report(folder, number) as report:
        code = _step(job, *_preflight(job, report))
        found = read_json(report) or {}
    unfit = ",".join(found.get("unfit", []))
    if code == BAD_INPUT and unfit and 0 < restarts < job.requeue_limit:
        say(f"{folder}: requeued to go on without {unfit}")
        return _requeue(number, exclude=unfit)
    if not code and (proof := job.training.proof()):
        code = _step(job, "sd_perf", *proof, alone=True)
    if not code:
        code = _train(job, bool(found.get("caches_cleared")))
    saved = position(folder)
    return _end(job, code, saved > before, f"at {saved:,} samples")


def _train(job: JobRun, caches_cleared: bool) -> int:
    """Train in all tasks, between the benchmark's lines; returns the exit code."""
    folder = job.training.folder
    recorded = recorded_clearing(folder)
    cleared = caches_cleared if recorded is None else recorded
    command = job.training.command(caches_cleared=cleared)
    return timed(folder, lambda: _step(job, "sd_perf.cluster.bound", *command))


def conclude_job(job: JobRun, submission: Path | None) -> int:
    """Evaluate and check the run in one task; requeued as training is, it draws what is missing.

    `submission` is the folder that logs go to.
    """
    return _begin(job, partial(_conclude, submission=submission))


def _conclude(job: JobRun, submission: Path | None) -> int:
    folder, trial = job.training.folder, os.environ.get("SLURM_ARRAY_TASK_ID", "0")
    before = scored(folder)
    words = ["sd_perf", "cluster", "conclude", str(folder)]
    if submission is not None:
        words += ["--submission", str(submission / f"result_{trial}.txt")]
    code, now = _step(job, *words), scored(folder)
    return _end(job, code, now > before, f"with {now[0]:,} checkpoints scored")


def _begin(job: JobRun, start: Callable[[JobRun], int]) -> int:
    """Start the job's own share, unless Slurm itself has requeued it over the limit."""
    job = _of_trial(job)
    if _restarts() <= job.requeue_limit:
        return start(job)
    often = f"Slurm has requeued it {_restarts()} times, over --requeue-limit"
    why = "look for nodes that fail, or for jobs that displace it"
    say(f"{job.training.folder}: not begun, {often}; {why}, then {_ONWARD}")
    return LOST


def _end(job: JobRun, code: int, advanced: bool, where: str) -> int:
    """Have the job requeued, or say why it is not; returns its exit code."""
    if not code:
        return 0
    again, words = decide(code, _restarts(), job.requeue_limit, advanced, where)
    say(f"{job.training.folder}: {words}")
    return _requeue(_job_id()) if again else code


def _of_trial(job: JobRun) -> JobRun:
    """The job's own share: each task of an array has a folder and a seed of its own."""
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    if task is None:
        return job
    training = job.training
    folder = training.folder.with_name(f"{training.folder.name}_trial_{task}")
    seed = None if training.seed is None else training.seed + int(task)
    return replace(job, training=replace(training, folder=folder, seed=seed))


def _job_id() -> str:
    """The name of this job for scontrol; of an array's task JOB_TASK.

    The last task of an array has the array's own number, by which scontrol would requeue all.
    """
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    try:
        return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]
    except KeyError as error:
        raise UserError(
            "SLURM_JOB_ID: is not set; this is the batch script's part, submit with slurm/sbatch.sh"
        ) from error


def _restarts() -> int:
    return int(os.environ.get("SLURM_RESTART_COUNT") or 0)


def scored(folder: Path) -> tuple[int, int]:
    """How far an evaluation is: checkpoints with scores, and files of the next one's pictures."""
    scores = folder / "scores.jsonl"
    lines = scores.read_bytes().count(b"\n") if scores.is_file() else 0
    return lines, len(list(folder.glob("evaluation/*/pictures_*.safetensors")))


@contextmanager
def _report(folder: Path, number: str) -> Iterator[Path]:
    """Where pre-flight, in a process of its own, leaves what this one must know."""
    path = folder.parent / f".preflight_{number}.json"
    path.unlink(missing_ok=True)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _preflight(job: JobRun, report: Path) -> list[str]:
    words = ["sd_perf", "cluster", "preflight", "--config", str(job.training.config)]
    words += ["--report", str(report), "--gpus-per-node", str(job.gpus_per_node)]
    if job.training.checkpoint:
        words += ["--text-encoder.weights", job.training.checkpoint]
    begun = recorded_clearing(job.training.folder) is not None
    return words if begun else [*words, "--clear-caches"]


def _step(job: JobRun, module: str, *arguments: str, alone: bool = False) -> int:
    """Run a module in every task of the job, or in one; returns one exit code for all of them."""
    options, prefix = in_container(job.container, job.mounts, Path.cwd())
    python = "python3" if job.container else sys.executable
    srun = ["srun", "--kill-on-bad-exit=0", f"--wait={_LAST_TASK_WAIT}", *_unbound()]
    srun += ["--nodes=1", "--ntasks=1"] if alone else []
    command = [*srun, *options, *prefix, python, "-m", module, *arguments]
    first = hosts(os.environ["SLURM_JOB_NODELIST"])[0]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "MASTER_ADDR": address(first)}
    codes: list[int] = []
    code = run(command, environment, listen=_collector(codes))
    return exit_code(code, codes)


def _unbound() -> list[str]:
    """Tasks are not bound to a processor each, where Slurm would: threads of a task need several,
    and sd_perf.cluster.bound chooses those near its GPU."""
    found = re.search(r"^TaskPlugin\s*=\s*(\S+)", call("scontrol", "show", "config"), re.M)
    return ["--cpu-bind=none"] if found and found[1] not in ("task/none", "(null)") else []


def _collector(codes: list[int]) -> Callable[[str], None]:
    """Notes what srun says of its tasks, such as "srun: error: n1: task 0: Exited with ...75"."""
    pattern = re.compile(r"srun: error: \S+ tasks? [\d,-]+: Exited with exit code (\d+)")

    def listen(line: str) -> None:
        if found := pattern.match(line):
            codes.append(int(found[1]))

    return listen


def exit_code(code: int, codes: list[int]) -> int:
    """The exit code of who ended a step: srun's own is the largest of all tasks.

    Those that noticed the loss of another leave with 76, which would hide its 1 or 2.
    """
    ended = [each for each in codes if each < STOPPED]
    return min(ended) if code and ended else code


def decide(code: int, restarts: int, limit: int, advanced: bool, where: str) -> tuple[bool, str]:
    """Whether to requeue a job that ended with this code, and why, in words.

    `advanced` says whether this start has saved anything new, `where` what is saved, in words. A
    stop without progress is final, since the next start would have no more time. What a lost node
    or process costs is nobody's choice: the limit alone bounds it.
    """
    if code == CTRL_C or (code not in (STOPPED, LOST) and code <= _SIGNALLED):
        return False, f"failed with exit code {code}; not requeued"
    stopped = {STOPPED: "stopped and saved", LOST: "lost a process"}
    ended = f"{stopped.get(code, f'killed (exit code {code})')} {where}"
    futile = code == STOPPED and restarts > 0 and not advanced
    if restarts < limit and not futile:
        return True, f"{ended}; to be requeued"
    why, first = f"it was {restarts} times (--requeue-limit)", ""
    if futile:
        why = "it saved nothing new since it was last requeued"
        first = "give it more --walltime, then "
    elif code != STOPPED:
        first = "find what kills it in the lines above and the nodes' logs, then "
    return False, f"{ended}; not requeued, {why}; {first}{_ONWARD}"


def _requeue(number: str, exclude: str = "") -> int:
    """Have Slurm start this job again, with the same id and script; returns where it does not.

    A job that is being cancelled is not revived. `exclude` are nodes that it then does without.
    """
    state = job_field(number, "JobState")
    if state == "COMPLETING" and job_field(number, "Reason") == "TimeLimit":
        state = "TIMEOUT"
    if state != "RUNNING":
        say(f"job {number} is {state}; {_LEFT_ALONE.get(state, 'not requeued')}")
        return STOPPED
    STOP.ignore()  # Slurm ends this script and what it runs by SIGTERM
    call("scontrol", "requeue", number)
    if exclude:
        call("scontrol", "update", f"JobId={number}", f"ExcNodeList={exclude}")
    return STOPPED
