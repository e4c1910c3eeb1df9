"""Draws pictures from a checkpoint's weights, and measures and scores them.

Shape letters: B pictures of a batch, H and W rows and columns.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sd_perf.config import Config, EvaluationConfig
from sd_perf.errors import DataError
from sd_perf.evaluation.clip_score import ClipScorer
from sd_perf.evaluation.feature_net import FeatureNet, read_feature_net
from sd_perf.evaluation.fid import FeatureStatistics, Gaussian, frechet_distance
from sd_perf.evaluation.generate import generate
from sd_perf.evaluation.inception import FidInception, read_inception
from sd_perf.evaluation.judge import describe, judge_shares
from sd_perf.evaluation.measured import GRID, Measured
from sd_perf.evaluation.prompts import read_prompts
from sd_perf.models.build import DTYPES, build_sampling_unet, build_text_encoder
from sd_perf.models.readers import read_decoder
from sd_perf.models.vae import PIXELS_PER_LATENT


class Evaluator:
    """Draws pictures from a checkpoint's weights and scores them. Loads its networks once.

    Raises ConfigError for a file that the config does not name, and DataError or CheckpointError
    for one that cannot be used.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        options = config.evaluation
        require_named(options, "prompts", "autoencoder", "features", "statistics", "clip_weights")
        self.config = config
        self.device = device
        self.prompts = read_prompts(Path(options.prompts), options.num_prompts)
        dtype = DTYPES[options.precision]
        self.decode = read_decoder(Path(options.autoencoder), device, dtype)
        self.features = features_of(config, device)
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

    def identity(self, weights: str) -> str:
        """A digest of all that pictures and their measures are a function of.

        `weights` is that of the checkpoint.
        """
        config = self.config
        drawn = {"steps": config.sampling.steps, "guidance_scale": config.sampling.guidance_scale}
        parts = (weights, self.prompts, drawn, asdict(config.evaluation))
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def starts(self) -> range:
        """The first prompt of every batch."""
        return range(0, len(self.prompts), self.config.evaluation.batch_size)

    def draw(
        self,
        weights: dict[str, torch.Tensor],
        seed: int,
        starts: Sequence[int],
        source: object = "the weights",
    ) -> Iterator[torch.Tensor]:
        """Pictures of the batches that begin at `starts`, each (B, 3, H, W) in [0, 1].

        A batch is the same whoever draws it, so on a CPU its pictures are, too, to the last bit.
        """
        self.unet.load_state_dict(weights)
        return generate(
            self.unet,
            self.text_encoder,
            self.decode,
            self.prompts,
            config=self.config,
            seed=seed,
            batch_size=self.config.evaluation.batch_size,
            starts=starts,
            source=source,
        )

    @torch.no_grad()
    def measure(self, start: int, pictures: torch.Tensor) -> Measured:
        """What scoring needs of pictures (B, 3, H, W), drawn from the prompts from `start` on."""
        prompts = self.prompts[start : start + len(pictures)]
        grid = pictures[: max(GRID - start, 0)]
        judged = self.config.evaluation.judge
        seen = [describe(image) for image in pictures.permute(0, 2, 3, 1).numpy()] if judged else []
        return Measured(
            indices=torch.arange(start, start + len(pictures)),
            features=self.features(pictures.to(self.device)).float().cpu(),
            cosines=self.clip.similarities(pictures, prompts),
            grid=(grid * 255).round().to(torch.uint8),
            seen=[scene.caption if scene else "" for scene in seen],
        )

    def scores(self, measured: Measured) -> dict[str, Any]:
        """FID, CLIP score and, in the tiny world, the judge's shares of one picture per prompt.

        Sums are of batches in the order of the prompts, so that they do not depend on who drew
        which picture.
        """
        statistics = FeatureStatistics(self.features.num_features)
        for features in measured.features.split(self.config.evaluation.batch_size):
            statistics.update(features)
        scores = {
            "fid": frechet_distance(statistics.gaussian(), self.real),
            "clip": measured.cosines.double().mean().item(),
        }
        if self.config.evaluation.judge:
            scores |= judge_shares(measured.seen, self.prompts)
        return {**scores, "n": statistics.count}


def require_named(options: EvaluationConfig, *keys: str) -> None:
    """ConfigError for a key of the evaluation section that names no file."""
    for key in keys:
        options.require(bool(getattr(options, key)), key, "the file that scores need")


def read_features(path: Path, device: torch.device) -> FeatureNet | FidInception:
    """The network whose features FID compares, frozen, on a device.

    A .safetensors file holds a `FeatureNet`, any other file the weights of FID's Inception.
    """
    network = read_feature_net(path) if path.suffix == ".safetensors" else read_inception(path)
    return network.to(device)


def features_of(config: Config, device: torch.device) -> FeatureNet | FidInception:
    """`read_features` of evaluation.features; DataError where it takes pictures of another size."""
    network = read_features(Path(config.evaluation.features), device)
    if isinstance(network, FidInception):
        network = network.to(DTYPES[config.evaluation.precision])
    pixels = PIXELS_PER_LATENT * config.data.latent_size
    if isinstance(network, FeatureNet) and network.config.image_size != pixels:
        size = network.config.image_size
        raise DataError(
            f"{config.evaluation.features}: takes pictures of {size}x{size} pixels, and "
            f"data.latent_size {config.data.latent_size} gives {pixels}x{pixels}; name another "
            "network as evaluation.features"
        )
    return network
