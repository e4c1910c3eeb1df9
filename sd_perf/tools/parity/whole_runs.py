"""Level world: whole runs of the config with both networks over three seeds, scored.

Half an hour in the tiny world. Runs are kept beside the record, each in a folder of its own; a
complete one is not made again.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sd_perf.children import child
from sd_perf.config import Config
from sd_perf.errors import UserError
from sd_perf.files import write_json
from sd_perf.runs.parity_record import Where
from sd_perf.runs.scores import read_scores
from sd_perf.tools.parity.comparison import Comparer, Comparison, Errors

SEEDS = (0, 1, 2)
STUDENT_T = 2.776
"""two-sided 95 % quantile of Student's t at four degrees of freedom: three runs of each network"""
SCORES = {"fid": "FID", "clip": "CLIP score", "judge": "judge, share of pictures right"}


def compare_scores(
    config: Config, where: Where, folder: Path, tell: Callable[[str], None]
) -> Iterator[Comparison]:
    """Compare each score that all runs have; makes the runs in `folder` that are not complete.

    UserError where a run or its evaluation fails.
    """
    runs = _Runs(config, folder, tell)
    plain = [runs.scores("plain", seed) for seed in SEEDS]
    fast = [runs.scores("fast", seed) for seed in SEEDS]
    comparer = Comparer(level="world", where=where, dtype=config.training.precision)
    for key, name in SCORES.items():
        if all(key in scores for scores in (*plain, *fast)):
            values = ([scores[key] for scores in some] for some in (plain, fast))
            yield _compare(comparer, name, *values)


def _compare(comparer: Comparer, name: str, plain: list[float], fast: list[float]) -> Comparison:
    """The difference of the means may be what chance makes it at 95 %, by the spread over seeds.

    Two-sample t-test with equal numbers of runs: t sqrt((s1^2 + s2^2) / n).
    """
    spreads = [statistics.stdev(values) for values in (plain, fast)]
    difference = abs(statistics.fmean(fast) - statistics.fmean(plain))
    allowed = STUDENT_T * math.sqrt(sum(spread**2 for spread in spreads) / len(SEEDS))
    notes = (
        f"{network} {statistics.fmean(values):.4g} ± {spread:.2g} "
        f"({', '.join(f'{value:.4g}' for value in values)})"
        for network, values, spread in zip(("plain", "fast"), (plain, fast), spreads, strict=True)
    )
    return comparer.judged(
        name,
        error=Errors.of_one_number(difference),
        torch_error=Errors.of_one_number(spreads[0]),
        allowed=Errors.of_one_number(allowed),
        note="; ".join(notes),
    )


@dataclasses.dataclass(frozen=True)
class _Runs:
    """The runs of a config, by network and seed."""

    config: Config
    folder: Path
    tell: Callable[[str], None]

    def scores(self, implementation: str, seed: int) -> dict[str, Any]:
        """The last line of a run's scores; the run is trained and evaluated first, if need be."""
        run = self.folder / f"{implementation}_seed{seed}"
        if not self._is_complete(run):
            preset = self.folder / f"{implementation}_seed{seed}.yaml"
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(preset, self._preset(implementation, seed, run))  # JSON is YAML, too
            self.tell(f"{run}: training and scoring")
            self._call(run, "train", "--config", str(preset), "--resume")
            self._call(run, "evaluate", str(run))
        return read_scores(run)[-1]

    def _is_complete(self, run: Path) -> bool:
        training = self.config.training
        length = self.config.steps_of(training.max_samples) * training.global_batch_size
        scores = read_scores(run) if run.is_dir() else []
        return bool(scores) and scores[-1]["samples"] >= length

    def _preset(self, implementation: str, seed: int, run: Path) -> dict[str, Any]:
        tree = dataclasses.asdict(self.config)
        tree["run"]["dir"], tree["training"]["seed"] = str(run), seed
        tree["model"]["implementation"] = implementation
        tree["mlperf"]["division"] = "none"
        if implementation == "plain":
            del tree["kernels"]  # the plain network refuses a choice of kernels
        return tree

    def _call(self, run: Path, *command: str) -> None:
        with child("sd_perf", *command, stdout=subprocess.DEVNULL) as process:
            code = process.wait()
        if code:
            raise UserError(
                f"{run}: sd-perf {command[0]} ended with {code}; run parity again to go on"
            )
