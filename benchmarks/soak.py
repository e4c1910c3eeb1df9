"""Kills runs at random moments in three ways; what they end with, beside a run never killed.

    python -m benchmarks.soak --folder DIR --output FILE [--rank 25 --launcher 20 --slurm-node 15]

A rank of a run, the launcher of a run (run_and_time.sh or its torchrun), or a node of a Slurm that
this command starts in its folder gets SIGKILL; then the run is continued, and perhaps killed again.
A row is one kill: its phase, samples lost, processes and files left behind, and whether weights,
losses and scores of the finished run are bit by bit those of the run never killed. After Ctrl-C the
command ends with the rows it has.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.command import Report, run_command
from benchmarks.soak_runs import (
    GONE_SECONDS,
    LAUNCHER,
    NODE,
    RANK,
    RUN_SECONDS,
    WAYS,
    KilledRun,
    LocalRun,
    SlurmRun,
)
from benchmarks.soak_world import BATCH, STEPS, Look, World, end_all, processes, wait
from benchmarks.virtual_cluster import VirtualCluster
from sd_perf.errors import UserError
from sd_perf.stopping import CTRL_C
from sd_perf.tools.results import Conditions

NAME = "soak"
PHASES = START_UP, STEP, WRITE, END = ("start-up", "step", "checkpoint write", "evaluation and end")
AIMS = ("any moment", STEP, WRITE, END)
MOST_KILLS_OF_A_RUN = 8
SLURM_START = 20.0
"""seconds that Slurm, pre-flight and a second process of Python put before a run's own start"""


class SoakRow(Conditions):
    """One kill, and what became of its run."""

    way: Literal["rank", "launcher", "slurm-node"]
    run: int
    """number of the run; several kills may hit one"""
    aim: str
    """phase that the moment was drawn in; any: from the whole run"""
    phase: str
    """phase that it hit, by what the run folder then held"""
    killed: str
    """command or node"""
    samples_at_kill: int
    samples_lost: int
    """trained since the newest checkpoint"""
    samples_repeated: int
    """set aside by the start that followed, to be trained again"""
    orphans: list[str]
    """processes of the run that outlived the kill by the time that they have"""
    weights_equal: bool
    """weights and AdamW's moments of every checkpoint of the run, bit by bit"""
    losses_equal: bool
    """every step's, each step once"""
    scores_equal: bool
    left_over: list[str]
    """files in the finished run's folder that the run never killed has not"""
    status: Literal["measured", "failed"]
    reason: str | None


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    add, folder = parser.add_argument, "empty folder for the runs, up to 1 GB"
    add("--folder", type=Path, required=True, metavar="DIR", help=folder)
    defaults = {RANK: 25, LAUNCHER: 20, NODE: 15}
    help_of = {NODE: "; needs root and Debian's Slurm, or apt-get to fetch it"}
    for way in WAYS:
        words = f"kills of a {way.replace('-', ' ')} (default: {defaults[way]}, with --tiny 2 or 0)"
        add(f"--{way}", type=int, metavar="N", help=words + help_of.get(way, ""))
    add("--seed", type=int, default=0, help="of runs, moments and victims (default: 0)")
    add(
        "--steps",
        type=int,
        default=STEPS,
        help=f"of a run, {BATCH} samples each (default: {STEPS})",
    )
    parser.set_defaults(defaults=defaults)


def measure(options: argparse.Namespace) -> int:
    """All kills; returns the exit code, 1 where a kill cost more than it may, 130 after Ctrl-C."""
    left = {way: getattr(options, way.replace("-", "_")) for way in WAYS}
    for way, count in left.items():
        if count is None:
            left[way] = (2 if way != NODE else 0) if options.tiny else options.defaults[way]
        elif count < 0:
            raise UserError(f"--{way}: {count} cannot be used; give 0 or more")
    if options.steps < 20:
        raise UserError(f"--steps: {options.steps} cannot be used; give 20 or more")
    report = Report(NAME, options, torch.device("cpu"), ("run", "way", "phase"))
    world = World(options.folder.absolute(), options.steps)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it like Ctrl-C
    stopped = False
    try:
        with contextlib.ExitStack() as stack:
            world.prepare()
            never_killed(world)
            cluster = start_cluster(world, stack) if left[NODE] else None
            kill_all(world, cluster, left, random.Random(options.seed), report)
    except KeyboardInterrupt:
        print("stopped; kills of the run under way are left out", file=sys.stderr)
        stopped = True
    finally:
        signal.signal(signal.SIGTERM, previous)
    print(summary(report.result.rows))
    failed = any(row["status"] == "failed" for row in report.result.rows)
    return CTRL_C if stopped else int(failed)


def start_cluster(world: World, stack: contextlib.ExitStack) -> VirtualCluster:
    """Slurm in the world's folder, until the stack is closed."""
    cluster = VirtualCluster(world.folder / "slurm")
    cluster.folder.mkdir()
    (world.folder / "hidden").mkdir()
    cluster.up(hidden=world.folder / "hidden")
    stack.callback(cluster.down)
    return cluster


def never_killed(world: World) -> None:
    """The run that all are compared with, and the times by which moments are drawn."""
    run = LocalRun(world, 0, RANK)
    begun = time.monotonic()
    try:
        run.start()
        first = begun + seconds_to(run, 1)
        last = first + seconds_to(run, world.end)
        wait(run.ended, RUN_SECONDS)
    finally:
        run.sweep()
    if run.outcome() or Look.at(run.folder).saved != world.end:
        raise UserError(f"the run that nothing kills fails: {run.last_words()}; see {run.log}")
    world.start_up, world.training = first - begun, last - first
    world.rest = time.monotonic() - last
    run.folder.rename(world.reference)


def seconds_to(run: KilledRun, position: int) -> float:
    """Wait until a run has logged a position, or has ended; the seconds that it took."""
    begun = time.monotonic()
    wait(lambda: run.ended() or Look.at(run.folder).trained >= position, RUN_SECONDS)
    return time.monotonic() - begun


def kill_all(
    world: World,
    cluster: VirtualCluster | None,
    left: dict[str, int],
    rng: random.Random,
    report: Report,
) -> None:
    """Runs until every way has its kills. `left` counts down; rows are added run by run."""
    number = 0
    while any(left.values()):
        number += 1
        [way] = rng.choices(WAYS, [left[way] for way in WAYS])
        kills = min(left[way], rng.randint(1, MOST_KILLS_OF_A_RUN))
        run: KilledRun
        if way == NODE:
            assert cluster is not None
            run = SlurmRun(world, number, cluster, nodes=rng.randint(1, 2))
        else:
            run = LocalRun(world, number, way, plain=rng.random() < 0.5)
        try:
            rows = killed_run(run, kills, rng)
        finally:
            run.sweep()
        left[way] -= len(rows)
        for row in rows:
            report.add({"batch": BATCH, "dtype": "fp32", "cached": "data", "run": number, **row})
        if all(row["status"] == "measured" for row in rows):
            shutil.rmtree(run.mark)  # what went wrong is kept, to be looked at


def killed_run(run: KilledRun, kills: int, rng: random.Random) -> list[dict[str, Any]]:
    """Start a run, kill it up to so many times, let it end, and compare; the columns of its
    kills."""
    rows: list[dict[str, Any]] = []
    run.start()
    while len(rows) < kills and (row := kill_once(run, rng)):
        rows.append(row)
        run.start()
    late = not wait(run.ended, RUN_SECONDS, poll=0.2)
    ended = Look.at(run.folder)
    after = [row["superseded"] for row in rows[1:]] + [ended.superseded] * bool(rows)
    faults = [run.outcome()] if run.outcome() else []
    faults += ["did not end in time"] if late else []
    compared = run.world.equal(run.folder)
    faults += [f"not {name.replace('_', ' ')}" for name, equal in compared.items() if not equal]
    left_over = run.world.left_over(run.folder) + run.orphans(GONE_SECONDS[RANK])
    faults += ["something is left over"] if left_over else []
    for row, superseded in zip(rows, after, strict=True):
        row["samples_repeated"] = BATCH * (superseded - row.pop("superseded"))
        all_faults = faults + (["orphans"] if row["orphans"] else [])
        row |= {**compared, "left_over": left_over}
        row |= {"status": "failed" if all_faults else "measured"}
        row |= {"reason": "; ".join(all_faults) or None}
    return rows


def kill_once(run: KilledRun, rng: random.Random) -> dict[str, Any] | None:
    """Kill a run that has been started, once; the columns of the kill. None: it ended before."""
    before, aim = Look.at(run.folder), rng.choice(AIMS)
    if not await_moment(run, before, aim, rng):
        return None
    killed = ""
    while not killed and not run.ended():
        killed = run.kill(rng)
        time.sleep(0 if killed else 0.01)
    if not killed:
        return None
    phase = phase_of(before, Look.at(run.folder), run.world.end)
    orphans = run.settle()
    end_all(processes(run.mark) if orphans else [])
    now = Look.at(run.folder)  # a rank that was left may have finished its checkpoint
    return {
        "way": run.way,
        "aim": aim,
        "phase": phase,
        "killed": killed,
        "samples_at_kill": before.saved if phase == START_UP else now.trained,
        "samples_lost": 0 if phase == START_UP else now.trained - now.saved,
        "superseded": now.superseded,
        "orphans": orphans,
    }


def await_moment(run: KilledRun, before: Look, aim: str, rng: random.Random) -> bool:
    """Sleep until the moment to kill, drawn from the phase `aim`; False where the run ended."""
    world = run.world
    share = rng.random()

    def until(condition: Callable[[Look], bool], poll: float = 0.02) -> None:
        wait(lambda: run.ended() or condition(Look.at(run.folder)), RUN_SECONDS, poll)

    if aim in (STEP, WRITE):
        until(lambda now: now.logged > before.logged)
        time.sleep(share * world.training)
    if aim == WRITE:
        until(lambda now: bool(now.writing - before.writing), poll=0.001)
        time.sleep(rng.uniform(0, 0.02))
    elif aim == END:
        until(lambda now: now.trained == world.end and now.logged > before.logged)
        time.sleep(share * world.rest)
    elif aim == "any moment":
        whole = world.start_up + world.training + world.rest
        time.sleep(share * (whole + (SLURM_START if run.way == NODE else 0)))
    return not run.ended()


def phase_of(before: Look, now: Look, end: int) -> str:
    """The phase that a kill hit, by what the folder held at the start and holds after the kill."""
    if now.logged == before.logged:
        return END if before.saved == end else START_UP
    if now.writing - before.writing:
        return WRITE
    return END if now.trained == end else STEP


def summary(rows: Sequence[Any]) -> str:
    """Kills by way and phase, and what they cost, as text."""
    counts = collections.Counter((row["way"], row["phase"]) for row in rows)
    lines = [f"{'kills':12s}" + "".join(f"{phase:>20s}" for phase in PHASES)]
    lines += [
        f"{way:12s}" + "".join(f"{counts[way, phase]:20d}" for phase in PHASES) for way in WAYS
    ]
    lost, again = (sum(row[f"samples_{word}"] for row in rows) for word in ("lost", "repeated"))
    good = sum(row["status"] == "measured" for row in rows)
    lines += [f"{lost:,} samples lost, {again:,} repeated; {good} of {len(rows)} kills as promised"]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill, compare, write; returns the exit code."""
    return run_command(NAME, __doc__, add_options, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
