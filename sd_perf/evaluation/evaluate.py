"""Scores of a run's checkpoints: FID, CLIP score and, in the tiny world, the judge; off the clock of training.

Each evaluation adds a line to `scores.jsonl`, a grid to `samples/`, and its events to the MLPerf log.

Shape letters: B pictures, H and W rows and columns.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from sd_perf.config import Config
from sd_perf.data.prepare.photographs import load_image, read_captioned_images
from sd_perf.distributed.checkpoints import CheckpointStore, load_component, read_state
from sd_perf.errors import CheckpointError, ConfigError
from sd_perf.evaluation.clip_score import ClipScorer
from sd_perf.evaluation.feature_net import read_feature_net
from sd_perf.evaluation.fid import FeatureStatistics, Gaussian, frechet_distance
from sd_perf.evaluation.generate import generate
from sd_perf.evaluation.inception import read_inception
from sd_perf.evaluation.judge import judge
from sd_perf.evaluation.prompts import read_prompts
from sd_perf.files import disk_errors, write_json
from sd_perf.mlperf.check import check
from sd_perf.mlperf.log import LOG_NAME, MLPerfLog
from sd_perf.models.build import build_text_encoder, build_unet
from sd_perf.models.sources import read_decoder

GRID = 64
"""pictures in a grid, at most"""
GRID_COLUMNS = 8
_MAKE_ROOM = "make room, then evaluate again"


class Evaluator:
    """Everything a checkpoint is scored with, loaded once."""

    def __init__(self, config: Config, device: torch.device) -> None:
        options = config.evaluation
        for key in ("prompts", "autoencoder", "features", "statistics", "clip_weights"):
            if not getattr(options, key):
                raise ConfigError(f"evaluation.{key}: '' cannot be used; name the file that scores need")
        self.config = config
        self.prompts = read_prompts(Path(options.prompts), options.num_prompts)
        self.decode = read_decoder(Path(options.autoencoder))
        self.features = read_features(Path(options.features), device)
        self.real = Gaussian.load_npz(Path(options.statistics))
        self.clip = ClipScorer(options.clip_model, Path(options.clip_weights), device)
        self.text_encoder = build_text_encoder(config, device)
        self.unet = build_unet(config.model, 0, device).eval()

    def draw(self, weights: dict[str, torch.Tensor], seed: int) -> torch.Tensor:
        """One picture per prompt (B, 3, H, W) float32 in [0, 1] with these UNet weights."""
        self.unet.load_state_dict(weights)
        batch_size = self.config.evaluation.batch_size
        return generate(self.unet, self.text_encoder, self.decode, self.prompts, self.config, seed, batch_size)

    def score(self, pictures: torch.Tensor, samples: int) -> dict[str, Any]:
        """A line of scores.jsonl for pictures (B, 3, H, W) drawn from the checkpoint at `samples`."""
        batch_size = self.config.evaluation.batch_size
        scores: dict[str, Any] = {
            "samples": samples,
            "fid": frechet_distance(statistics_of(pictures.split(batch_size), self.features), self.real),
            "clip": self.clip.score(pictures, self.prompts, batch_size),
        }
        if self.config.evaluation.judge:
            scores |= judge_scores(pictures, self.prompts)
        return {**scores, "n": len(pictures)}


def judge_scores(pictures: torch.Tensor, prompts: list[str]) -> dict[str, float]:
    """Shares of pictures (B, 3, H, W) that show their own caption, and the next picture's where that is another."""
    images = list(pictures.permute(0, 2, 3, 1).numpy())
    own = zip(images, prompts, strict=True)
    others = zip(images, prompts, prompts[1:] + prompts[:1], strict=True)
    shuffled = [judge(image, other) for image, prompt, other in others if other != prompt]
    return {
        "judge": float(np.mean([judge(image, prompt) for image, prompt in own])),
        "judge_shuffled": float(np.mean(shuffled)),
    }


def read_features(path: Path, device: torch.device) -> torch.nn.Module:
    """The network whose features are compared: a feature net's .safetensors, or the FID Inception's weights."""
    network = read_feature_net(path) if path.suffix == ".safetensors" else read_inception(path)
    return network.to(device)


@torch.no_grad()
def statistics_of(batches: Any, features: torch.nn.Module) -> Gaussian:
    """Mean and covariance of the features of pictures, given as batches (B, 3, H, W) in [0, 1]."""
    device = next(features.parameters()).device
    statistics: FeatureStatistics | None = None
    for batch in batches:
        values = features(batch.to(device)).cpu()
        statistics = statistics or FeatureStatistics(values.shape[1])
        statistics.update(values)
    if statistics is None:
        raise ValueError("statistics of no pictures")
    return statistics.gaussian()


def write_statistics(images: Path, config: Config) -> int:
    """Write evaluation.statistics from a folder of captioned images; returns how many there were."""
    size, batch_size = 8 * config.data.latent_size, config.evaluation.batch_size
    samples = read_captioned_images(images, allow_empty=True)
    batches = (
        torch.stack([load_image(sample.path, size) for sample in samples[start : start + batch_size]])
        for start in range(0, len(samples), batch_size)
    )
    features = read_features(Path(config.evaluation.features), torch.device("cpu"))
    path = Path(config.evaluation.statistics)
    with disk_errors(path, "make room or name another file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        statistics_of(batches, features).save_npz(path)
    return len(samples)


def write_grid(pictures: torch.Tensor, prompts: list[str], folder: Path, samples: int) -> Path:
    """The first pictures as one PNG without padding, its captions in a JSON of the same name; returns the PNG."""
    from PIL import Image

    count = min(GRID, len(pictures))
    columns = min(GRID_COLUMNS, count)
    pixels = (pictures[: count - count % columns] * 255).round().to(torch.uint8)
    rows = pixels.unflatten(0, (-1, columns)).permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    path = folder / f"samples_{samples:010d}.png"
    with disk_errors(path, _MAKE_ROOM):
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rows.numpy()).save(path)
        write_json(path.with_suffix(".json"), {"prompts": prompts[: len(pixels)], "columns": columns})
    return path


def evaluate_run(run: Path, config: Config, device: torch.device, tell: Callable[[str], None]) -> None:
    """Score every complete checkpoint of a run that has no scores yet, oldest first; `tell` is told of each."""
    done = {line["samples"] for line in read_scores(run)}
    checkpoints = {read_state(path)["samples"]: path for path in CheckpointStore(run / "checkpoints").complete()}
    if not checkpoints:
        raise CheckpointError(f"{run}: holds no complete checkpoint to evaluate")
    evaluator = Evaluator(config, device)
    for samples in sorted(checkpoints.keys() - done):
        start = time.time()
        pictures = evaluator.draw(load_component(checkpoints[samples], "model"), config.training.seed or 0)
        scores = evaluator.score(pictures, samples)
        write_grid(pictures, evaluator.prompts, run / "samples", samples)
        if config.mlperf.division != "none":
            log = MLPerfLog(run / LOG_NAME, config)
            log.add_evaluation(samples, scores["fid"], scores["clip"], int(1000 * start), int(1000 * time.time()))
        with disk_errors(run / "scores.jsonl", _MAKE_ROOM), (run / "scores.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(scores) + "\n")
        tell(f"{samples:,} samples: FID {scores['fid']:.2f}, CLIP {scores['clip']:.4f} (n = {scores['n']:,})")
    _conclude(run, config, complete=max(checkpoints) >= config.training.max_samples)


def _conclude(run: Path, config: Config, complete: bool) -> None:
    """End the MLPerf log where a checkpoint has passed, or where no further one will come."""
    options = config.evaluation
    passed = any(line["fid"] <= options.fid_target and line["clip"] >= options.clip_target for line in read_scores(run))
    if config.mlperf.division == "none" or not (passed or complete):
        return
    log = MLPerfLog(run / LOG_NAME, config)
    log.conclude(options.fid_target, options.clip_target)
    verdict = check(run / LOG_NAME)
    facts = {"division": verdict.division, "ruleset": verdict.ruleset, "passed": verdict.passed, "words": str(verdict)}
    write_json(run / "mlperf_verdict.json", facts)


def read_scores(run: Path) -> list[dict[str, Any]]:
    """Lines of a run's scores.jsonl; none where nothing was evaluated yet."""
    path = run / "scores.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def scores_table(run: Path) -> Table:
    """All scores of a run for the terminal."""
    judged = any("judge" in line for line in read_scores(run))
    columns = ["samples", "FID", "CLIP", *(["shows its caption", "shows another's"] if judged else []), "n"]
    table = Table(*columns, title=f"{run}", title_justify="left")
    for line in read_scores(run):
        shares = [f"{100 * line[key]:.0f} %" for key in ("judge", "judge_shuffled") if key in line]
        table.add_row(f"{line['samples']:,}", f"{line['fid']:.2f}", f"{line['clip']:.4f}", *shares, f"{line['n']:,}")
    return table
