"""Scores the checkpoints of a run: FID, CLIP score and, in the tiny world, the judge.

It is a command of its own, so its time is not part of training. Each evaluation adds a line to
`scores.jsonl`, a grid of pictures to `samples/`, and its events to the MLPerf log.

Shape letters: B pictures, H and W rows and columns.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table

from sd_perf.config import Config, EvaluationConfig
from sd_perf.data.images import write_png
from sd_perf.data.prepare.captioned_images import load_captioned_image
from sd_perf.data.prepare.image_folder import read_images
from sd_perf.data.threads import map_ahead
from sd_perf.distributed.world import World
from sd_perf.errors import CheckpointError, UserError
from sd_perf.evaluation.evaluator import Evaluator, features_of, require_named
from sd_perf.evaluation.fid import FeatureStatistics
from sd_perf.evaluation.generate import numbered_paths, save_pictures
from sd_perf.evaluation.measured import MAKE_ROOM, Keeper, Measured
from sd_perf.files import disk_errors, json_lines, read_json, write_json, write_text
from sd_perf.mlperf.compliance import check_log
from sd_perf.mlperf.log import LOG_NAME, MLPerfLog, logged_scores, read_log
from sd_perf.models.vae import PIXELS_PER_LATENT
from sd_perf.runs.checkpoint_files import read_state
from sd_perf.runs.checkpoints import CheckpointStore, load_weights, position
from sd_perf.runs.folder import require_of_run
from sd_perf.runs.lock import RunLock
from sd_perf.runs.scores import read_json_lines, read_scores, rounded, scores_path
from sd_perf.visible import visible

GRID_COLUMNS = 8
KEYS = ("samples", "fid", "clip", "n")
"""numbers that every line of scores.jsonl must have"""
POLL_SECONDS = 10
"""between two looks for a new checkpoint"""


@torch.no_grad()
def write_statistics(images: Path, config: Config) -> int:
    """Write evaluation.statistics, the features' Gaussian over real images; returns their number.

    `images` is a folder of captioned images or of raw shards. As for the benchmark's statistics,
    the images are resized to the square that the config trains on without keeping their aspect. The
    benchmark also saved them as JPEG before it read them; that is not done here.
    """
    require_named(config.evaluation, "features", "statistics")
    size, batch_size = PIXELS_PER_LATENT * config.data.latent_size, config.evaluation.batch_size
    samples = read_images(images, allow_empty=True)
    features = features_of(config, torch.device("cpu"))
    statistics = FeatureStatistics(features.num_features)
    for start in range(0, len(samples), batch_size):
        batch = [
            load_captioned_image(sample, size, fit="squash")
            for sample in samples[start : start + batch_size]
        ]
        statistics.update(features(torch.stack(batch)))
    path = Path(config.evaluation.statistics)
    with disk_errors(path, "make room or name another file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        statistics.gaussian().save_npz(path)
    return len(samples)


def grid_path(folder: Path, samples: int) -> Path:
    """The PNG of pictures drawn at a position of the run."""
    return folder / f"samples_{samples:010d}.png"


def write_grid(pictures: torch.Tensor, prompts: list[str], folder: Path, samples: int) -> Path:
    """Write pictures (B, 3, H, W) as one PNG grid, and a JSON of the same name with the prompts.

    The grid is white where the last row has no picture. Returns the path of the PNG.
    """
    columns = min(GRID_COLUMNS, len(pictures))
    gap = pictures.new_ones(-len(pictures) % columns, *pictures.shape[1:])
    rows = torch.cat([pictures, gap]).unflatten(0, (-1, columns))
    # (rows, columns, 3, H, W) -> (3, rows, H, columns, W) -> (3, rows H, columns W)
    grid = rows.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    path = grid_path(folder, samples)
    with disk_errors(path, MAKE_ROOM):
        folder.mkdir(parents=True, exist_ok=True)
        write_png(grid, path)
        shown = {"prompts": prompts[: len(pictures)], "columns": columns}
        write_json(path.with_suffix(".json"), shown)
    return path


@dataclass(frozen=True)
class Wanted:
    """Which checkpoints of a run to evaluate, and with what beside the scores."""

    checkpoint: int | None = None
    """position of the only one; None: all that have no scores yet"""
    num_prompts: int | None = None
    """so many of the prompts, for a first look that is told and not recorded"""
    until_passed: bool = False
    """stop after the first checkpoint that passes both targets"""
    wait_minutes: float | None = None
    """wait so long for another checkpoint of a run that is under way"""
    pictures: Path | None = None
    """folder for all pictures, as PNGs named by their place among the prompts"""
    ema: bool = False
    """score the moving average of the weights: scores_ema.jsonl, samples_ema, and no MLPerf log"""
    precision: Literal["fp32", "bf16"] | None = None
    """in place of the config's evaluation.precision; scores of one run have one precision"""


def evaluate_run(
    run: Path,
    config: Config,
    world: World,
    tell: Callable[[str], None],
    wanted: Wanted | None = None,
) -> None:
    """Score complete checkpoints of a run, oldest first, with all ranks of a world.

    `tell` is called with a sentence per checkpoint. Then the MLPerf log is concluded where the run
    has passed or is complete. Raises CheckpointError where there is nothing to evaluate.
    """
    wanted = wanted or Wanted()
    given = {name: getattr(wanted, name) for name in ("num_prompts", "precision")}
    options = replace(config.evaluation, **{k: v for k, v in given.items() if v is not None})
    usual, config = config.evaluation.precision, replace(config, evaluation=options)
    world.on_main(lambda: _require_precision(run, options.precision, usual, wanted))
    evaluator: Evaluator | None = None
    waiting = Waiting(run, config, wanted)
    while True:
        for samples, checkpoint in world.on_main(lambda: _due(run, config, wanted)):
            evaluator = evaluator or world.together(lambda: Evaluator(config, world.device))
            scores = _evaluate(evaluator, world, checkpoint, samples, wanted, tell)
            tell(
                f"{samples:,} samples: FID {scores['fid']:.2f}, CLIP {scores['clip']:.4f} (n = "
                f"{scores['n']:,})"
            )
            if wanted.until_passed and _passes(scores, config.evaluation):
                break
        if not world.on_main(waiting.goes_on):
            break
        time.sleep(POLL_SECONDS)
    if wanted.num_prompts is None and not wanted.ema:
        world.on_main(lambda: _conclude(run, config))


class Waiting:
    """Whether an evaluator waits for more checkpoints of a run that is under way."""

    def __init__(self, run: Path, config: Config, wanted: Wanted) -> None:
        self._run, self._config, self._wanted = run, config, wanted
        self._newest, self._since = -1, time.monotonic()

    def goes_on(self) -> bool:
        """Whether to look for checkpoints again in a while.

        Not where the run is complete, and all its checkpoints are scored or one passed that
        suffices; nor where nobody trains and none came for as many minutes as are waited.
        """
        minutes, config = self._wanted.wait_minutes, self._config
        if minutes is None:
            return False
        scores = read_scores(self._run, KEYS, self._wanted.ema)
        if self._wanted.until_passed and any(_passes(line, config.evaluation) for line in scores):
            return False
        newest = max(_checkpoints(self._run), default=0)
        if newest > self._newest or not RunLock().is_free(self._run):
            self._newest, self._since = newest, time.monotonic()
        # The last checkpoint may have landed since the last look.
        if newest >= config.training.max_samples:
            return newest not in {line["samples"] for line in scores}
        return time.monotonic() - self._since < 60 * minutes


def _checkpoints(run: Path) -> dict[int, Path]:
    """The complete checkpoints of a run by position."""
    return {position(path): path for path in CheckpointStore(run / "checkpoints").complete()}


def _due(run: Path, config: Config, wanted: Wanted) -> list[tuple[int, Path]]:
    """Positions and paths of the checkpoints to evaluate now, oldest first.

    CheckpointError where the run has none, or lacks the one that is wanted.
    """
    checkpoints = _checkpoints(run)
    if wanted.checkpoint is not None and wanted.checkpoint not in checkpoints:
        there = ", ".join(f"{samples:,}" for samples in sorted(checkpoints)) or "none"
        raise CheckpointError(
            f"{run}: holds no complete checkpoint at {wanted.checkpoint:,} samples; there: {there}"
        )
    if not checkpoints and wanted.wait_minutes is None:
        raise CheckpointError(f"{run}: holds no complete checkpoint to evaluate")
    scores = read_scores(run, KEYS, wanted.ema)
    if wanted.until_passed and any(_passes(line, config.evaluation) for line in scores):
        return []
    done = set() if wanted.num_prompts else {line["samples"] for line in scores}
    of_all = checkpoints if wanted.checkpoint is None else [wanted.checkpoint]
    return [(samples, checkpoints[samples]) for samples in sorted(set(of_all) - done)]


def _require_precision(run: Path, precision: str, usual: str, wanted: Wanted) -> None:
    """UserError where scores of one precision would be recorded beside those of another.

    `usual` is the config's, of which lines are that name none.
    """
    if wanted.num_prompts is not None:
        return
    lines = read_scores(run, KEYS, wanted.ema)
    other = [each for line in lines if (each := line.get("precision", usual)) != precision]
    if other:
        theirs = visible(other[0])
        raise UserError(
            f"{scores_path(run, wanted.ema)}: holds scores in {theirs}, beside which none in "
            f"{precision} are recorded; give --precision {theirs}, look with --num-prompts, which "
            "records nothing, or move that file aside"
        )


def _passes(scores: dict[str, Any], options: EvaluationConfig) -> bool:
    return scores["fid"] <= options.fid_target and scores["clip"] >= options.clip_target


def _evaluate(
    evaluator: Evaluator,
    world: World,
    checkpoint: Path,
    samples: int,
    wanted: Wanted,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Draw and score one checkpoint, and record what it gives; returns its scores.

    The line of scores.jsonl is written last: a checkpoint without one is evaluated again, from the
    pictures that were kept.
    """
    config, start, run = evaluator.config, time.time(), checkpoint.parents[1]
    state = world.on_main(lambda: _state_of(checkpoint, run))
    name = f"samples_{samples:010d}"
    if wanted.num_prompts is not None:
        name += f"_first_{wanted.num_prompts}"
    if wanted.ema:
        name, state = f"{name}_ema", f"{state} ema"
    keeper = Keeper(run / "evaluation" / name, of=evaluator.identity(state))
    _draw(evaluator, world, keeper, checkpoint, wanted, tell)

    def conclude() -> dict[str, Any]:
        measured = keeper.complete(len(evaluator.prompts), tell)
        scores = {
            "samples": samples,
            **evaluator.scores(measured),
            "precision": config.evaluation.precision,
            "start_ms": int(1000 * start),
            "stop_ms": int(1000 * time.time()),
        }
        if wanted.num_prompts is None:
            folder = run / f"samples{'_ema' * wanted.ema}"
            if not _shows_own_prompts(folder, samples, evaluator.prompts):
                write_grid(measured.grid / 255, evaluator.prompts, folder, samples)
            _record(run, config, scores, wanted)
        keeper.clear()
        return scores

    return world.on_main(conclude)


def _shows_own_prompts(folder: Path, samples: int, prompts: list[str]) -> bool:
    """Whether training drew a grid of sampling.prompts there: other prompts than the first ones."""
    drawn = read_json(grid_path(folder, samples).with_suffix(".json"))
    shown = drawn.get("prompts") if isinstance(drawn, dict) else None
    return isinstance(shown, list) and shown != prompts[: len(shown)]


def _state_of(checkpoint: Path, run: Path) -> str:
    """The digest of a checkpoint's state; CheckpointError where it is of another run."""
    state = read_state(checkpoint)
    require_of_run(checkpoint, state, run)
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _draw(
    evaluator: Evaluator,
    world: World,
    keeper: Keeper,
    checkpoint: Path,
    wanted: Wanted,
    tell: Callable[[str], None],
) -> None:
    """Draw and measure what is not kept yet, each rank every so many-th batch of it."""

    def missing() -> list[int]:
        kept = keeper.kept(tell)
        have = set() if kept is None else set(kept.indices.tolist())
        if have:
            tell(f"{checkpoint}: {len(have):,} pictures were drawn before")
        return [start for start in evaluator.starts() if start not in have]

    starts = world.on_main(missing)[world.rank :: world.size]
    seed = evaluator.config.training.seed or 0

    def draw() -> None:
        weights = load_weights(checkpoint, wanted.ema)
        batches = evaluator.draw(weights, seed, starts, source=checkpoint)

        def measured(drawn: tuple[int, torch.Tensor]) -> Measured:
            start, batch = drawn
            if wanted.pictures is not None:
                save_pictures(batch, numbered_paths(wanted.pictures, start, len(batch)))
            return evaluator.measure(start, batch)

        drawn = zip(starts, batches, strict=True)
        # A GPU draws the next batch meanwhile; on a CPU both would want the same cores.
        beside = world.device.type == "cuda"
        parts = map_ahead(measured, drawn, threads=1, ahead=1) if beside else map(measured, drawn)
        try:
            for part in parts:
                keeper.add(part)
        finally:  # what a signal stops is kept, too
            keeper.flush()

    world.together(draw)


def _record(run: Path, config: Config, scores: dict[str, Any], wanted: Wanted) -> None:
    """Add scores to their file and, where they are a finished run's, to the MLPerf log."""
    path = scores_path(run, wanted.ema)
    with disk_errors(path, MAKE_ROOM):
        lines, _ = read_json_lines(path, KEYS)
        write_text(path, json_lines([*lines, scores]))
    if wanted.wait_minutes is None and not wanted.ema:
        _log_evaluations(run, config)


def _log_evaluations(run: Path, config: Config) -> None:
    """Add the evaluations that the run's MLPerf log lacks, with the times at which they were."""
    if config.mlperf.division == "none":
        return
    logged = logged_scores(read_log(run / LOG_NAME))
    log = MLPerfLog(run / LOG_NAME, config)
    for line in read_scores(run, KEYS):
        if line["samples"] not in logged and "start_ms" in line:
            times = {name: line[name] for name in ("start_ms", "stop_ms")}
            log.add_evaluation(line["samples"], fid=line["fid"], clip=line["clip"], **times)


def _conclude(run: Path, config: Config) -> None:
    """End the MLPerf log where a checkpoint has passed the targets, or none will follow."""
    options = config.evaluation
    passed = any(_passes(line, options) for line in read_scores(run, KEYS))
    complete = max(_checkpoints(run), default=0) >= config.training.max_samples
    if config.mlperf.division == "none" or not (passed or complete):
        return
    _log_evaluations(run, config)
    log = MLPerfLog(run / LOG_NAME, config)
    log.conclude(options.fid_target, options.clip_target)
    verdict = check_log(run / LOG_NAME)
    facts = {
        "division": verdict.division,
        "ruleset": verdict.ruleset,
        "passed": verdict.passed,
        "words": str(verdict),
    }
    write_json(run / "mlperf_verdict.json", facts)


def scores_table(run: Path, ema: bool = False) -> Table:
    """All scores of a run, or of the average of its weights, as a table for the terminal."""
    lines = read_scores(run, KEYS, ema)
    judged = any("judge" in line for line in lines)
    columns = [
        "samples",
        "FID",
        "CLIP",
        *(["shows its caption", "shows another's"] if judged else []),
        "n",
    ]
    title = f"{visible(run)}{' (drawn in bf16)' * rounded(lines)}"
    table = Table(*columns, title=title, title_justify="left")
    for line in lines:
        shares = [f"{100 * line[key]:.0f} %" for key in ("judge", "judge_shuffled") if key in line]
        table.add_row(
            f"{line['samples']:,}",
            f"{line['fid']:.2f}",
            f"{line['clip']:.4f}",
            *shares,
            f"{line['n']:,}",
        )
    return table
