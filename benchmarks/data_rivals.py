"""The webdataset library's way through the shards that `benchmarks.data` reads."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from sd_perf.models.vae import PIXELS_PER_LATENT


def moments_rival(
    folder: Path, options: argparse.Namespace, workers: int, batches: int
) -> Callable[[], None]:
    """A call that reads an epoch of moments, of as many batches."""
    keys = ["npy", "txt", *(["context.npy"] if options.context == "precomputed" else [])]

    def collate(samples: list[tuple[Any, ...]]) -> list[Any]:
        moments, captions, *context = zip(*samples, strict=True)
        states = [torch.from_numpy(np.stack(each)).float() for each in context]
        return [torch.from_numpy(np.stack(moments))[:, 0], captions, *states]

    return _epoch(
        folder, options, workers, batches, lambda read: read.decode().to_tuple(*keys), collate
    )


def pictures_rival(
    folder: Path, options: argparse.Namespace, workers: int, batches: int
) -> Callable[[], None]:
    """A call that reads an epoch of pictures by Pillow and torch, as the reference does."""
    size = PIXELS_PER_LATENT * options.latent_size

    def transform(image: Any) -> torch.Tensor:
        """torchvision's ToTensor, Resize(size, BICUBIC, antialias=True) and CenterCrop(size)."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255
        short = min(pixels.shape[1:])
        sides = [side * size // short for side in pixels.shape[1:]]
        pixels = F.interpolate(pixels[None], sides, mode="bicubic", antialias=True)[0]
        top, left = (round((side - size) / 2) for side in sides)
        return pixels[:, top : top + size, left : left + size].contiguous()

    def collate(samples: list[tuple[Any, ...]]) -> list[Any]:
        pixels, captions = zip(*samples, strict=True)
        return [torch.stack(pixels), captions]

    def decoded(read: Any) -> Any:
        return read.decode("pilrgb").to_tuple("jpg", "txt").map_tuple(transform)

    return _epoch(folder, options, workers, batches, decoded, collate)


def _epoch(
    folder: Path,
    options: argparse.Namespace,
    workers: int,
    batches: int,
    decoded: Callable[[Any], Any],
    collate: Callable[[list[tuple[Any, ...]]], list[Any]],
) -> Callable[[], None]:
    import webdataset

    shards = sorted(str(path) for path in folder.glob("*.tar"))

    def epoch() -> None:
        dataset = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0, empty_check=False)
        samples = decoded(dataset.shuffle(1000))
        read = samples.batched(options.batch, collation_fn=collate)
        loader = (
            webdataset.WebLoader(read, batch_size=None, num_workers=workers) if workers else read
        )
        count = sum(1 for _ in loader)
        assert count >= batches  # workers end with a batch each that is not full

    return epoch


RIVALS = {"moments": moments_rival, "encoded": moments_rival, "raw": pictures_rival}
"""by format of the shards that are read; encoded ones against the same samples as moments"""
