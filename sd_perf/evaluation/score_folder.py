"""FID and CLIP score of any folder of pictures, by the benchmark's definition.

The pictures may be another trainer's or another model's. They are taken as they are stored, as
pytorch-fid takes them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from sd_perf.data.prepare.image_folder import read_images
from sd_perf.data.threads import map_ahead
from sd_perf.errors import DataError
from sd_perf.evaluation.clip_score import ClipScorer
from sd_perf.evaluation.evaluator import read_features
from sd_perf.evaluation.feature_net import FeatureNet
from sd_perf.evaluation.fid import FeatureStatistics, Gaussian, frechet_distance
from sd_perf.evaluation.folder_statistics import (
    BATCH_SIZE,
    features_of_pictures,
    find_pictures,
    read_picture,
)
from sd_perf.evaluation.inception import FidInception
from sd_perf.evaluation.prompts import read_prompts

FEW = 10_000
"""pictures below which FID is biased by about as much as models differ (Chong & Forsyth 2020,
arXiv 1911.07023, figure 1)"""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class FolderScores:
    """Scores of a folder's pictures, and how many they are."""

    n: int
    fid: float | None
    clip: float | None


@dataclass(frozen=True)
class Scoring:
    """What a folder is scored with: files of networks, captions and real pictures."""

    features: Path | None = None
    """network of FID's features; None: no FID"""
    statistics: Path | None = None
    """.npz with mu and sigma of the real pictures, or a folder of them"""
    captions: Path | None = None
    """captions.jsonl that names the pictures, or a .tsv with a caption for each in their order;
    None: no CLIP score"""
    clip_model: str = "ViT-H-14"
    clip_weights: Path | None = None
    threads: int = 8


@torch.no_grad()
def score_folder(
    folder: Path,
    scoring: Scoring,
    device: torch.device,
    progress: Progress = lambda done, of: None,
) -> FolderScores:
    """Score all pictures of a folder; with a captions.jsonl those that it names.

    `progress` is called with the pictures that are done, and of how many. Raises DataError for
    files that are missing, cannot be decoded or do not belong together, and ConfigError for
    networks that cannot be had.
    """
    paths, captions = _pictures_and_captions(folder, scoring.captions)
    network = None if scoring.features is None else read_features(scoring.features, device)
    clip = None
    if scoring.captions is not None and scoring.clip_weights is not None:
        clip = ClipScorer(scoring.clip_model, scoring.clip_weights, device)
    statistics = None if network is None else FeatureStatistics(network.num_features)
    cosines: list[torch.Tensor] = []
    done = 0
    for batch in _batches(paths, scoring.threads):
        if network is not None and statistics is not None:
            statistics.update(features_of_pictures(network, batch, device))
        if clip is not None:
            # One at a time where sizes differ: each is resized alone in any case.
            cosines += [
                clip.similarities(picture[None], [captions[done + place]])
                for place, picture in enumerate(batch)
            ]
        done += len(batch)
        progress(done, len(paths))
    fid = None
    if network is not None and statistics is not None and scoring.statistics is not None:
        real = _real(scoring.statistics, network, device, scoring.threads)
        fid = frechet_distance(statistics.gaussian(), real)
    mean = torch.cat(cosines).double().mean().item() if cosines else None
    return FolderScores(len(paths), fid, mean)


def _pictures_and_captions(folder: Path, captions: Path | None) -> tuple[list[Path], list[str]]:
    """The pictures to score, and the caption of each where there is a file of captions."""
    if captions is None:
        return find_pictures(folder), []
    if captions.suffix == ".tsv":
        paths = find_pictures(folder)
        return paths, read_prompts(captions, len(paths))
    images = read_images(folder, captions)
    return [image.path for image in images], [image.captions[0] for image in images]


def _real(
    statistics: Path, network: FeatureNet | FidInception, device: torch.device, threads: int
) -> Gaussian:
    """The Gaussian of real pictures: from a file, or computed of a folder."""
    if not statistics.is_dir():
        real = Gaussian.load_npz(statistics)
        if len(real.mean) != network.num_features:
            raise DataError(
                f"{statistics}: holds statistics of {len(real.mean)} features, and the network "
                f"gives {network.num_features}; take those made with this network"
            )
        return real
    sums = FeatureStatistics(network.num_features)
    for batch in _batches(find_pictures(statistics), threads):
        sums.update(features_of_pictures(network, batch, device))
    return sums.gaussian()


def _batches(paths: list[Path], threads: int) -> Iterator[list[torch.Tensor]]:
    """The pictures (3, H, W) of files in batches of pytorch-fid's size, decoded ahead."""
    pictures = map_ahead(read_picture, paths, threads, BATCH_SIZE + threads)
    with contextlib.closing(pictures):
        while batch := list(itertools.islice(pictures, BATCH_SIZE)):
            yield batch
