"""Level world: whole runs of the config with both networks over three seeds, scored; half an hour
in the tiny world.

Runs are kept beside the record, each in a folder of its own, and those that are complete are not
made again.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sd_perf.config import Config
from sd_perf.errors import UserError
from sd_perf.files import write_json
from sd_perf.runs.scores import read_scores
from sd_perf.tools.parity.rows import Row

SEEDS = (0, 1, 2)
STUDENT = 2.776
"""of 95 % for two times three runs, four degrees of freedom (Student's t)"""
SCORES = {"fid": "FID", "clip": "CLIP score", "judge": "judge, share of pictures right"}


def compare_worlds(
    config: Config, where: str, folder: Path, tell: Callable[[str], None]
) -> Iterator[Row]:
    """A row per score: the difference of the means, and what chance allows it to be by the spread
    over seeds."""
    scores = {
        way: [_scored(config, way, seed, folder, tell) for seed in SEEDS]
        for way in ("plain", "fast")
    }
    for key, name in SCORES.items():
        if all(key in line for lines in scores.values() for line in lines):
            plain, fast = ([line[key] for line in scores[way]] for way in ("plain", "fast"))
            yield _row(name, where, plain, fast, config.training.precision)


def _row(name: str, where: str, plain: list[float], fast: list[float], precision: str) -> Row:
    spreads = [statistics.stdev(values) for values in (plain, fast)]
    difference = abs(statistics.fmean(fast) - statistics.fmean(plain))
    allowed = STUDENT * math.sqrt(sum(spread**2 for spread in spreads) / len(SEEDS))
    words = (
        f"{way} {statistics.fmean(values):.4g} ± {spread:.2g} "
        f"({', '.join(f'{v:.4g}' for v in values)})"
        for way, values, spread in zip(("plain", "fast"), (plain, fast), spreads, strict=True)
    )
    numbers = difference, difference, spreads[0], spreads[0], allowed, allowed
    return Row("world", name, where, precision, *numbers, note="; ".join(words))


def _scored(
    config: Config, way: str, seed: int, folder: Path, tell: Callable[[str], None]
) -> dict[str, Any]:
    """Last line of scores of one run, which is trained and evaluated where it is not yet."""
    run = folder / f"{way}_seed{seed}"
    length = config.steps_of(config.training.max_samples) * config.training.global_batch_size
    if not _is_done(run, length):
        preset = folder / f"{way}_seed{seed}.yaml"
        folder.mkdir(parents=True, exist_ok=True)
        write_json(preset, _preset(config, way, seed, run))  # which is YAML too
        tell(f"{run}: training and scoring")
        for command in (["train", "--config", str(preset), "--resume"], ["evaluate", str(run)]):
            done = subprocess.run(
                [sys.executable, "-m", "sd_perf", *command], stdout=subprocess.DEVNULL
            )
            if done.returncode:
                raise UserError(
                    f"{run}: sd-perf {command[0]} ended with {done.returncode}; run parity again "
                    "to go on"
                )
    return read_scores(run)[-1]


def _is_done(run: Path, length: int) -> bool:
    scores = read_scores(run) if run.is_dir() else []
    return bool(scores) and scores[-1]["samples"] >= length


def _preset(config: Config, way: str, seed: int, run: Path) -> dict[str, Any]:
    tree = dataclasses.asdict(config)
    tree["run"]["dir"], tree["training"]["seed"] = str(run), seed
    tree["model"]["implementation"] = way
    tree["mlperf"]["division"] = "none"
    if way == "plain":
        del tree["kernels"]
    return tree
