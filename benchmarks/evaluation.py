"""Pictures per second of evaluation, part by part: sampling, FID's features, the CLIP score.

    python -m benchmarks.evaluation [--config FILE] [--pictures 64] [--output FILE.json]

Networks are those that `sd-perf evaluate` builds for the preset, from the files that its section
`evaluation` names; without --config the tiny world's. The UNet's weights are those of the seed: how
long a picture takes does not depend on what it shows. No statistics of real pictures are needed.
Each part runs once to warm up; then every part runs --turns times, and its median counts.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import Report, run_command
from benchmarks.training_run import preset
from sd_perf.config import Config, SamplingConfig
from sd_perf.errors import ConfigError, UserError
from sd_perf.evaluation.clip_score import ClipScorer
from sd_perf.evaluation.evaluator import read_features
from sd_perf.evaluation.fid import FeatureStatistics, frechet_distance
from sd_perf.evaluation.generate import generate
from sd_perf.models.build import build_sampling_unet, build_text_encoder
from sd_perf.models.readers import read_decoder
from sd_perf.presets import load_preset
from sd_perf.tools.results import REPOSITORY, Conditions

NAME = "evaluation"
TINY_STEPS, TINY_PICTURES = 2, 4
FILES = ("autoencoder", "features", "clip_weights")


class PartRow(Conditions):
    """One part of an evaluation."""

    part: str
    pictures: int
    sampling_steps: int | None
    """DDIM steps, each with guidance: two passes of the UNet; None: the part draws nothing"""
    pictures_per_second: float | None
    """None: the part is done once, whatever the number of pictures"""
    part_s: float
    """median seconds of the part for all pictures"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help="preset that names the networks' files")
    add("--pictures", type=int, default=64, metavar="N", help="pictures drawn (default: 64)")
    add("--batch", type=int, metavar="N", help="drawn at a time (default: evaluation.batch_size)")
    add("--turns", type=int, default=3, metavar="N", help="runs of each part (default: 3)")


def config_of(options: argparse.Namespace) -> Config:
    """The preset of the options, small with --tiny; ConfigError where it names a file too few."""
    config = load_preset(options.config) if options.config else preset("smoke.yaml")
    scores, text = config.evaluation, config.text_encoder
    if not options.config:
        # The preset's paths count from the repository's root, wherever the command is run.
        names = (*FILES, "clip_model")
        paths: dict[str, Any] = {name: str(REPOSITORY / getattr(scores, name)) for name in names}
        scores = replace(scores, **paths)
        weights, model = REPOSITORY / text.weights, REPOSITORY / text.model
        text = replace(text, weights=str(weights), model=str(model))
    for name in FILES:
        if not getattr(scores, name):
            raise ConfigError(f"evaluation.{name}: names no file; give a preset that names all")
    batch = options.batch or scores.batch_size
    scores = replace(scores, batch_size=min(batch, options.pictures))
    sampling = config.sampling
    if options.tiny:
        sampling = SamplingConfig(steps=TINY_STEPS, guidance_scale=sampling.guidance_scale)
    return replace(config, evaluation=scores, sampling=sampling, text_encoder=text)


class Parts:
    """The parts of an evaluation of `prompts`, each a call that can be repeated."""

    def __init__(self, config: Config, device: torch.device, prompts: list[str]) -> None:
        scores = config.evaluation
        self.config, self.device, self.prompts = config, device, prompts
        self.decode = read_decoder(Path(scores.autoencoder), device)
        self.text_encoder = build_text_encoder(config, device)
        self.unet = build_sampling_unet(config, device)
        self.features = read_features(Path(scores.features), device)
        self.clip = ClipScorer(scores.clip_model, Path(scores.clip_weights), device)
        self.pictures = self.draw()
        generator = torch.Generator().manual_seed(0)
        drawn = torch.randn(
            4 * self.features.num_features,
            self.features.num_features,
            generator=generator,
            dtype=torch.float64,
        )
        statistics_of = FeatureStatistics(self.features.num_features)
        statistics_of.update(drawn)
        self.gaussian = statistics_of.gaussian()

    def calls(self) -> dict[str, Callable[[], Any]]:
        """The parts by name."""
        return {
            "text encoder": partial(self.text_encoder, self.prompts),
            "sampling: text, DDIM, decoder": self.draw,
            "FID: features": self.extract,
            "CLIP score": self.score,
            "FID: distance": partial(frechet_distance, self.gaussian, self.gaussian),
        }

    def draw(self) -> list[torch.Tensor]:
        """Pictures of the prompts, in batches (B, 3, H, W)."""
        batch = self.config.evaluation.batch_size
        drawn = generate(
            self.unet,
            self.text_encoder,
            self.decode,
            self.prompts,
            config=self.config,
            seed=0,
            batch_size=batch,
        )
        return list(drawn)

    @torch.no_grad()
    def extract(self) -> None:
        """FID's features of all pictures, summed up."""
        found = FeatureStatistics(self.features.num_features)
        for pictures in self.pictures:
            found.update(self.features(pictures.to(self.device)))

    def score(self) -> None:
        """CLIP scores of all pictures and their prompts."""
        start = 0
        for pictures in self.pictures:
            self.clip.similarities(pictures, self.prompts[start : start + len(pictures)])
            start += len(pictures)


def measure(options: argparse.Namespace) -> int:
    """Time every part; returns the exit code."""
    if options.tiny:
        options.pictures, options.turns = TINY_PICTURES, 1
    if min(options.pictures, options.turns, options.batch or 1) < 1:
        raise UserError("--pictures, --turns, --batch: give 1 or more")
    config = config_of(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report = Report(NAME, options, device, ("part", "batch"), ["open_clip_torch"])
    prompts = [f"a picture of number {number}" for number in range(options.pictures)]
    for name, call in Parts(config, device, prompts).calls().items():
        seconds = [timed(call, device) for _ in range(options.turns + 1)][1:]
        report.add(row_of(name, statistics.median(seconds), options.pictures, config))
    return 0


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call, with the GPU's work in it."""
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def row_of(part: str, seconds: float, pictures: int, config: Config) -> PartRow:
    """A row of a part that took so many seconds for all pictures."""
    once, draws = part == "FID: distance", part.startswith("sampling")
    return {
        "batch": None if once else config.evaluation.batch_size,
        "dtype": "float64" if once else "float32",
        "cached": "weights in memory" if draws or part == "text encoder" else "weights, pictures",
        "part": part,
        "pictures": pictures,
        "sampling_steps": config.sampling.steps if draws else None,
        "pictures_per_second": None if once else pictures / seconds,
        "part_s": seconds,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit code."""
    return run_command(NAME, __doc__, add_options, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
