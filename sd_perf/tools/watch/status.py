"""Where a run stands, read from its folder alone: no lock is taken, and any host may look."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_perf.runs.checkpoints import CheckpointStore, position
from sd_perf.runs.folder import read_manifest, run_length
from sd_perf.runs.lock import holder
from sd_perf.runs.scores import sort_out_scores
from sd_perf.tools.watch.follow import FollowedLines

METRICS = ("samples", "loss", "lr", "samples_per_second", "data_wait")
_RECENT = 10
"""logged steps that a rate is the median of"""
_SILENT_SECONDS = 120.0
"""without a line, and twenty times as long as lines take, before a run is said to be silent"""
_LONGEST_WAIT = 1e9
"""seconds to the end that are shown: 32 years"""


@dataclass(frozen=True)
class Status:
    """A run at one moment. What it does not have is None or empty."""

    folder: Path
    total: int | None
    """length, samples"""
    metrics: list[dict[str, Any]]
    """one per logged step, oldest first"""
    quiet_seconds: float | None
    """time since the last line of metrics"""
    holder: str | None
    """host and process that said they write in the folder"""
    checkpoint: int | None
    """position of the newest"""
    checkpoint_seconds: float | None
    """its age"""
    scores: list[dict[str, Any]]
    """oldest first, see `sort_out_scores`"""
    damaged: int
    """lines that are left out"""

    @property
    def samples(self) -> int:
        """Position of the run, as far as its files know."""
        logged = self.metrics[-1]["samples"] if self.metrics else 0
        return max(logged, self.checkpoint or 0)

    @property
    def is_complete(self) -> bool:
        return self.total is not None and self.samples >= self.total

    @property
    def rate(self) -> float | None:
        """Samples per second, median of the last logged steps."""
        recent = [line["samples_per_second"] for line in self.metrics[-_RECENT:]]
        return statistics.median(recent) if recent else None

    @property
    def seconds_left(self) -> float | None:
        """Time to the end at the present rate, checkpoints and evaluations aside; None where it is
        not known, or further off than anybody waits."""
        if self.total is None or not self.rate or self.rate <= 0:
            return None
        seconds = max(0, self.total - self.samples) / self.rate
        return seconds if seconds < _LONGEST_WAIT else None

    @property
    def state(self) -> str:
        """What the run does, in words."""
        if self.is_complete:
            return "complete"
        if self.holder is None:
            return "not running"
        if self._is_silent():
            return f"silent: killed, or busy with something else than steps ({self.holder})"
        return f"running on {self.holder}"

    def _is_silent(self) -> bool:
        if self.quiet_seconds is None or not self.metrics:
            return False
        samples = [line["samples"] for line in self.metrics[-2:]]
        usual = (samples[-1] - samples[0]) / max(self.rate or 0, 1e-9)
        return self.quiet_seconds > max(_SILENT_SECONDS, 20 * usual)


class Watcher:
    """Looks at a run folder again and again; each look costs what was added."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._metrics = FollowedLines(folder / "metrics.jsonl", METRICS)

    def look(self) -> Status:
        """The run now; UserError for a folder that is no run, or a file that cannot be read."""
        folder = self._folder
        manifest = read_manifest(folder)
        self._metrics.read()
        scores = sort_out_scores(folder)
        newest, now, written_at = self._checkpoint(), time.time(), self._metrics.written_at
        return Status(
            folder=folder,
            total=run_length(manifest),
            metrics=self._metrics.objects,
            quiet_seconds=None if written_at is None else max(0.0, now - written_at),
            holder=holder(folder),
            checkpoint=newest[0] if newest else None,
            checkpoint_seconds=max(0.0, now - newest[1]) if newest else None,
            scores=scores.objects,
            damaged=self._metrics.damaged + len(scores.damaged),
        )

    def _checkpoint(self) -> tuple[int, float] | None:
        """Position of the newest checkpoint, and when it was written."""
        for path in reversed(CheckpointStore(self._folder / "checkpoints").complete()):
            try:
                return position(path), path.stat().st_mtime
            except FileNotFoundError:  # checkpoint.keep has dropped it since it was listed
                continue
        return None
