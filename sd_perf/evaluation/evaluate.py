"""Scores the checkpoints of a run: FID, CLIP score and, in the tiny world, the judge.

It is a command of its own, so its time is not part of training. Each evaluation adds a line to
`scores.jsonl`, a grid of pictures to `samples/`, and its events to the MLPerf log.

Shape letters: B pictures, H and W rows and columns.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from sd_perf.config import Config, EvaluationConfig
from sd_perf.data.images import write_png
from sd_perf.data.prepare.captioned_images import load_captioned_image
from sd_perf.data.prepare.raw_shards import read_images
from sd_perf.data.prepare.scenes import Attributes
from sd_perf.errors import CheckpointError, DataError
from sd_perf.evaluation.clip_score import ClipScorer
from sd_perf.evaluation.feature_net import FeatureNet, read_feature_net
from sd_perf.evaluation.fid import FeatureStatistics, Gaussian, frechet_distance
from sd_perf.evaluation.generate import generate
from sd_perf.evaluation.inception import FidInception, read_inception
from sd_perf.evaluation.judge import describe, judge_shares
from sd_perf.evaluation.prompts import read_prompts
from sd_perf.files import disk_errors, json_lines, write_json, write_text
from sd_perf.mlperf.compliance import check_log
from sd_perf.mlperf.log import LOG_NAME, MLPerfLog
from sd_perf.models.build import build_sampling_unet, build_text_encoder
from sd_perf.models.readers import read_decoder
from sd_perf.models.vae import PIXELS_PER_LATENT
from sd_perf.runs.checkpoint_files import read_state
from sd_perf.runs.checkpoints import CheckpointStore, load_component, position
from sd_perf.runs.folder import require_of_run
from sd_perf.runs.scores import read_json_lines, read_scores
from sd_perf.visible import visible

GRID = 64
"""pictures in a grid, at most"""
GRID_COLUMNS = 8
_KEYS = ("samples", "fid", "clip", "n")
"""numbers that every line of scores.jsonl must have"""
_MAKE_ROOM = "make room, then evaluate again"


class Evaluator:
    """Draws pictures from a checkpoint's weights and scores them. Loads its networks once.

    Raises ConfigError for a file that the config does not name, and DataError or CheckpointError
    for one that cannot be used.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        options = config.evaluation
        _require_named(options, "prompts", "autoencoder", "features", "statistics", "clip_weights")
        self.config = config
        self.device = device
        self.prompts = read_prompts(Path(options.prompts), options.num_prompts)
        self.decode = read_decoder(Path(options.autoencoder))
        self.features = _features_of(config, device)
        self.real = Gaussian.load_npz(Path(options.statistics))
        # Told here, since the distance is computed only after all pictures are drawn.
        theirs, ours = len(self.real.mean), self.features.num_features
        if theirs != ours:
            raise DataError(
                f"{options.statistics}: holds statistics of {theirs} features, and "
                f"{options.features} gives {ours}; "
                f"make the statistics again with sd-perf data statistics"
            )
        self.clip = ClipScorer(options.clip_model, Path(options.clip_weights), device)
        self.text_encoder = build_text_encoder(config, device)
        self.unet = build_sampling_unet(config, device)

    def draw(
        self, weights: dict[str, torch.Tensor], seed: int, source: object = "the weights"
    ) -> Iterator[torch.Tensor]:
        """One picture per prompt with these UNet weights, in batches (B, 3, H, W) in [0, 1]."""
        self.unet.load_state_dict(weights)
        return generate(
            self.unet,
            self.text_encoder,
            self.decode,
            self.prompts,
            config=self.config,
            seed=seed,
            batch_size=self.config.evaluation.batch_size,
            source=source,
        )

    @torch.no_grad()
    def score(
        self, batches: Iterable[torch.Tensor], samples: int
    ) -> tuple[dict[str, Any], torch.Tensor]:
        """Score batches (B, 3, H, W) drawn from the checkpoint at position `samples`.

        Returns the line for scores.jsonl, and the first GRID pictures. No other picture is kept
        after its batch: the benchmark's 30,000 would take 94 GB.
        """
        statistics = FeatureStatistics(self.features.num_features)
        cosines: list[torch.Tensor] = []
        described: list[Attributes | None] = []
        first: list[torch.Tensor] = []
        for pictures in batches:
            start = statistics.count
            cosines.append(
                self.clip.similarities(pictures, self.prompts[start : start + len(pictures)])
            )
            statistics.update(self.features(pictures.to(self.device)))
            if self.config.evaluation.judge:
                described += [describe(image) for image in pictures.permute(0, 2, 3, 1).numpy()]
            if start < GRID:
                first.append(pictures[: GRID - start].clone())
        scores = {
            "samples": samples,
            "fid": frechet_distance(statistics.gaussian(), self.real),
            "clip": torch.cat(cosines).double().mean().item(),
        }
        if self.config.evaluation.judge:
            scores |= judge_shares(described, self.prompts)
        return {**scores, "n": statistics.count}, torch.cat(first)


def _require_named(options: EvaluationConfig, *keys: str) -> None:
    """ConfigError for a key of the evaluation section that names no file."""
    for key in keys:
        options.require(bool(getattr(options, key)), key, "the file that scores need")


def read_features(path: Path, device: torch.device) -> FeatureNet | FidInception:
    """The network whose features FID compares, frozen, on a device.

    A .safetensors file holds a `FeatureNet`, any other file the weights of FID's Inception.
    """
    network = read_feature_net(path) if path.suffix == ".safetensors" else read_inception(path)
    return network.to(device)


def _features_of(config: Config, device: torch.device) -> FeatureNet | FidInception:
    """`read_features` of evaluation.features; DataError where it takes pictures of another size."""
    network = read_features(Path(config.evaluation.features), device)
    pixels = PIXELS_PER_LATENT * config.data.latent_size
    if isinstance(network, FeatureNet) and network.config.image_size != pixels:
        size = network.config.image_size
        raise DataError(
            f"{config.evaluation.features}: takes pictures of {size}x{size} pixels, and "
            f"data.latent_size {config.data.latent_size} gives {pixels}x{pixels}; name another "
            "network as evaluation.features"
        )
    return network


@torch.no_grad()
def write_statistics(images: Path, config: Config) -> int:
    """Write evaluation.statistics, the features' Gaussian over real images; returns their number.

    `images` is a folder of captioned images or of raw shards. As for the benchmark's statistics,
    the images are resized to the square that the config trains on without keeping their aspect. The
    benchmark also saved them as JPEG before it read them; that is not done here.
    """
    _require_named(config.evaluation, "features", "statistics")
    size, batch_size = PIXELS_PER_LATENT * config.data.latent_size, config.evaluation.batch_size
    samples = read_images(images, allow_empty=True)
    features = _features_of(config, torch.device("cpu"))
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


def write_grid(pictures: torch.Tensor, prompts: list[str], folder: Path, samples: int) -> Path:
    """Write pictures (B, 3, H, W) as one PNG grid, and a JSON of the same name with the prompts.

    Pictures that do not fill a row are left out. Returns the path of the PNG.
    """
    columns = min(GRID_COLUMNS, len(pictures))
    shown = pictures[: len(pictures) // columns * columns]
    # (rows, columns, 3, H, W) -> (3, rows, H, columns, W) -> (3, rows H, columns W)
    grid = shown.unflatten(0, (-1, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    path = folder / f"samples_{samples:010d}.png"
    with disk_errors(path, _MAKE_ROOM):
        folder.mkdir(parents=True, exist_ok=True)
        write_png(grid, path)
        write_json(
            path.with_suffix(".json"), {"prompts": prompts[: len(shown)], "columns": columns}
        )
    return path


def evaluate_run(
    run: Path, config: Config, device: torch.device, tell: Callable[[str], None]
) -> None:
    """Score every complete checkpoint of a run that has no scores yet, oldest first.

    `tell` is called with a sentence per checkpoint. Then the MLPerf log is concluded where the run
    has passed or is complete. Raises CheckpointError where the run has no complete checkpoint.
    """
    done = {line["samples"] for line in read_scores(run, _KEYS)}
    checkpoints = {position(path): path for path in CheckpointStore(run / "checkpoints").complete()}
    if not checkpoints:
        raise CheckpointError(f"{run}: holds no complete checkpoint to evaluate")
    if waiting := sorted(checkpoints.keys() - done):
        evaluator = Evaluator(config, device)
        for samples in waiting:
            scores = _evaluate(evaluator, run, checkpoints[samples], samples)
            tell(
                f"{samples:,} samples: FID {scores['fid']:.2f}, CLIP {scores['clip']:.4f} (n = "
                f"{scores['n']:,})"
            )
    _conclude(run, config, complete=max(checkpoints) >= config.training.max_samples)


def _evaluate(evaluator: Evaluator, run: Path, checkpoint: Path, samples: int) -> dict[str, Any]:
    """Draw and score one checkpoint, and write what it gives; returns its line of scores.jsonl.

    The line is written last: a checkpoint without one is evaluated again.
    """
    config, start = evaluator.config, time.time()
    require_of_run(checkpoint, read_state(checkpoint), run)
    seed = config.training.seed or 0
    pictures = evaluator.draw(load_component(checkpoint, "model"), seed, source=checkpoint)
    scores, first = evaluator.score(pictures, samples)
    write_grid(first, evaluator.prompts, run / "samples", samples)
    if config.mlperf.division != "none":
        log = MLPerfLog(run / LOG_NAME, config)
        log.add_evaluation(
            samples,
            fid=scores["fid"],
            clip=scores["clip"],
            start_ms=int(1000 * start),
            stop_ms=int(1000 * time.time()),
        )
    path = run / "scores.jsonl"
    with disk_errors(path, _MAKE_ROOM):
        lines, _ = read_json_lines(path, _KEYS)
        write_text(path, json_lines([*lines, scores]))
    return scores


def _conclude(run: Path, config: Config, complete: bool) -> None:
    """End the MLPerf log where a checkpoint has passed the targets, or none will follow."""
    options = config.evaluation
    scores = read_scores(run, _KEYS)
    passed = any(
        line["fid"] <= options.fid_target and line["clip"] >= options.clip_target for line in scores
    )
    if config.mlperf.division == "none" or not (passed or complete):
        return
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


def scores_table(run: Path) -> Table:
    """All scores of a run, as a table for the terminal."""
    lines = read_scores(run, _KEYS)
    judged = any("judge" in line for line in lines)
    columns = [
        "samples",
        "FID",
        "CLIP",
        *(["shows its caption", "shows another's"] if judged else []),
        "n",
    ]
    table = Table(*columns, title=visible(run), title_justify="left")
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
