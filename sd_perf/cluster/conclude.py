"""What follows a run, off its clock: scores, the checker's verdict, and the log's place."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from sd_perf.cluster.commands import say
from sd_perf.errors import UserError
from sd_perf.files import disk_errors, written_aside
from sd_perf.mlperf.compliance import check_log
from sd_perf.mlperf.log import LOG_NAME, read_log
from sd_perf.runs.folder import read_run_config


def conclude(folder: Path, submission: Path | None) -> int:
    """Print verdict and score of an evaluated run; returns 1 where the checker fails its log.

    `submission` is where a copy of the log goes, such as .../stable_diffusion/result_3.txt.
    """
    if read_run_config(folder).mlperf.division == "none":
        say("no MLPerf log: mlperf.division is none")
        return 0
    verdict = check_log(folder / LOG_NAME)
    say(score(folder / LOG_NAME))
    for line in str(verdict).split("\n"):
        say(line)
    if submission is not None:
        copy_log(folder / LOG_NAME, submission)
        say(str(submission))
    return 0 if verdict.passed else 1


def score(log: Path) -> str:
    """Minutes from run_start to run_stop of a log that converged, as a line; else what it ended
    with."""
    times = {event.key: event.time_ms for event in read_log(log)}
    stops = [event for event in read_log(log) if event.key == "run_stop"]
    if not stops or "run_start" not in times:
        return "score: none, the log has no run_stop"
    minutes = (stops[-1].time_ms - times["run_start"]) / 60_000
    samples = stops[-1].metadata.get("samples_count", math.nan)
    if stops[-1].metadata["status"] != "success":
        return f"score: none, not converged after {minutes:.2f} minutes ({samples:,} samples)"
    return f"score: {minutes:.2f} minutes to the targets ({samples:,} samples)"


def copy_log(log: Path, submission: Path) -> None:
    """Copy a run's log to its place in a submission; UserError where another one is there."""
    if submission.exists() and submission.read_bytes() != log.read_bytes():
        raise UserError(
            f"{submission}: is the log of another run; give each set of trials a --results-dir of "
            "its own"
        )
    with disk_errors(submission, "make room, or choose another --results-dir"):
        submission.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(submission) as draft:
            shutil.copyfile(log, draft)
