"""Sections `run`, `checkpoint`, `logging` and `mlperf`: what a run writes, where and when."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

from sd_perf.config.rules import PathText, Rule, Samples, Section, Steps, at_most

Seconds = Annotated[int, Rule(lambda seconds: seconds > 0, "at least 1, seconds"), at_most(86_400)]


@dataclass(frozen=True)
class RunConfig(Section):
    """The run folder, and the patience of its processes with each other."""

    section = "run"

    dir: Annotated[PathText, Rule(bool, "the name of a folder")] = "runs/default"
    """folder that receives manifest, metrics and checkpoints"""
    note: str = ""
    """what the run can and cannot show; printed under its last table"""
    join_seconds: Seconds = 60
    """time for all processes of the run to come, seconds"""
    silence_seconds: Seconds = 60
    """time after which a process of the run that gives no sign of life is given up, seconds"""
    collective_seconds: Seconds = 1800
    """time after which a collective that some rank has not come to ends the run, seconds; ranks may
    wait for rank 0 to build an index"""

    @property
    def patience(self) -> tuple[float, float, float]:
        """Seconds for `distributed.world.start_world`: to join, of silence, of a collective."""
        return self.join_seconds, self.silence_seconds, self.collective_seconds


@dataclass(frozen=True)
class CheckpointConfig(Section):
    """When training state is written, and how much of it is kept."""

    section = "checkpoint"

    every_samples: Samples = 512_000
    """distance between checkpoints, samples (rounded up to whole steps)"""
    keep: Annotated[
        int | None,
        Rule(lambda keep: keep > 0, "at least 1, or none to keep all"),
        at_most(1_000_000),
    ] = None
    """newest checkpoints kept; none keeps all"""


@dataclass(frozen=True)
class LoggingConfig(Section):
    """How often the run reports while it trains."""

    section = "logging"

    every_steps: Steps = 10
    """optimizer steps between lines of metrics.jsonl and of the progress display"""
    sinks: tuple[Literal["tensorboard", "wandb", "csv"], ...] = ()
    """tools that get a copy of curves, scores and pictures while the run goes on"""
    wandb_project: Annotated[str, Rule(bool, "a project's name")] = "sd-perf"
    """project of Weights & Biases that the run is shown in"""
    wandb_mode: Literal["online", "offline"] = "online"
    """offline: keep its files in the run folder, for `wandb sync`"""
    prometheus: PathText = ""
    """file for Prometheus' node exporter (*.prom in its textfile directory); empty: none"""


def _is_range(steps: str) -> bool:
    """Whether the text is empty, or A:B with A < B <= A + 1000. A step takes megabytes of trace."""
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", steps, re.ASCII)
    return not steps or (found is not None and 0 < int(found[2]) - int(found[1]) <= 1000)


@dataclass(frozen=True)
class ProfileConfig(Section):
    """Which steps are recorded operator by operator, to `profile/` in the run folder."""

    section = "profile"

    steps: Annotated[
        str,
        Rule(
            _is_range,
            "A:B, the first step, counted from 0, and the one after the last, at most 1000 later",
        ),
    ] = ""
    """steps A to B-1 of the run, as A:B, counted from 0; these are slower; empty: none"""

    @property
    def first_and_end(self) -> tuple[int, int]:
        """A and B; ValueError where no steps are wanted."""
        first, end = self.steps.split(":")
        return int(first), int(end)


LogText = Annotated[
    str,
    Rule(
        lambda text: text.isprintable() and ":::MLLOG" not in text,
        "one line of text without control characters and without :::MLLOG, which begins a log line",
    ),
]
"""text that goes into the MLPerf log"""


@dataclass(frozen=True)
class MLPerfConfig(Section):
    """The MLPerf log of the run, `result_0.txt`."""

    section = "mlperf"

    division: Literal["none", "closed", "open"] = "none"
    """none: no log; closed: refuse values that its rules forbid; open: take any"""
    org: LogText = ""
    """submission_org"""
    platform: LogText = ""
    """submission_platform"""
    status: Literal["", "onprem", "cloud", "preview", "research"] = ""
    """submission_status"""
    parity_record: PathText = ""
    """parity.json that proves the fast network (default: in the folder <run.dir>.parity)"""
    waive: tuple[Literal["parity"], ...] = ()
    """checks to start without, as the log will say; parity: a green parity record"""
    caches_cleared: bool = False
    """the system's file caches were dropped before this process; logged as cache_clear"""
