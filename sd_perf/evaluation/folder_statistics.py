"""FID's statistics of a folder of pictures, as pytorch-fid computes those of the benchmark.

Every picture is taken as it is stored: the benchmark's were resized before, and saved as JPEG.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sd_perf.data.digests import digest
from sd_perf.data.images import decode_image
from sd_perf.data.npz import read_npz
from sd_perf.data.threads import map_ahead
from sd_perf.errors import DataError
from sd_perf.evaluation.evaluator import read_features
from sd_perf.evaluation.feature_net import FeatureNet
from sd_perf.evaluation.fid import FeatureStatistics
from sd_perf.files import disk_errors, is_absent, one_line, opened_untrusted, written_aside

EXTENSIONS = ("bmp", "jpeg", "jpg", "pgm", "png", "ppm", "tif", "tiff", "webp")
"""of the files that pytorch-fid takes for pictures"""
BATCH_SIZE = 50
"""pictures per call of the network, as in pytorch-fid"""
_SAVE_EVERY = 20
"""batches between two records of the sums so far, of 34 MB each"""
_MAKE_ROOM = "make room or name another file"


@torch.no_grad()
def write_folder_statistics(
    folder: Path,
    output: Path,
    features: Path,
    *,
    device: torch.device,
    batch_size: int = BATCH_SIZE,
    threads: int = 8,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> int:
    """Write mean and covariance, float64, of the features of a folder's pictures; returns how many
    there are.

    `features` is a file that `read_features` takes: for the benchmark FID's Inception. What is
    summed up so far is saved beside `output` from time to time, and a call with the same pictures,
    network and batch size goes on from there, to the same bits. `progress` is called with the
    pictures that are done, and of how many. Raises DataError where `output` exists, for a folder
    without pictures, and for one that cannot be decoded.
    """
    if not is_absent(output):
        raise DataError(f"{output}: is there already; move it away or name another file")
    paths = find_pictures(folder)
    network = read_features(features, device)
    partial = output.with_name(f"{output.name}.partial_{_fingerprint(paths, features, batch_size)}")
    with disk_errors(output, _MAKE_ROOM, DataError):
        output.parent.mkdir(parents=True, exist_ok=True)
    statistics = _resumed(partial, network.num_features, device)
    pictures = map_ahead(read_picture, paths[statistics.count :], threads, batch_size + threads)
    with contextlib.closing(pictures), disk_errors(output, _MAKE_ROOM, DataError):
        for number in itertools.count(1):
            batch = list(itertools.islice(pictures, batch_size))
            if not batch:
                break
            statistics.update(features_of_pictures(network, batch, device))
            progress(statistics.count, len(paths))
            if number % _SAVE_EVERY == 0:
                _save(statistics, partial)
        statistics.gaussian().save_npz(output)
        partial.unlink(missing_ok=True)
    return statistics.count


def find_pictures(folder: Path) -> list[Path]:
    """The pictures of a folder by name; DataError where there are none."""
    suffixes = {f".{extension}" for extension in EXTENSIONS}
    paths = sorted(path for path in folder.glob("*") if path.suffix in suffixes)
    if not paths:
        raise DataError(f"{folder}: holds no pictures (*.{', *.'.join(EXTENSIONS)})")
    return paths


def read_picture(path: Path) -> torch.Tensor:
    """A picture as (3, H, W) float32 in [0, 1]; DataError where it cannot be decoded.

    Grey becomes RGB, and transparency is dropped, by Pillow's own conversion as in pytorch-fid.
    """
    remedy = "mend it or make it again"
    try:
        with opened_untrusted(path, remedy, DataError) as file:
            pixels = np.array(decode_image(file).convert("RGB"))
    except ValueError as error:
        raise DataError(f"{path}: cannot be decoded ({one_line(error)}); {remedy}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous().float() / 255


def features_of_pictures(
    network: nn.Module, pictures: list[torch.Tensor], device: torch.device
) -> torch.Tensor:
    """Features of pictures, those of one size at a time.

    DataError for a size that the network does not take; FID's Inception takes any.
    """
    if isinstance(network, FeatureNet):
        right = (3, network.config.image_size, network.config.image_size)
        wrong = next((tuple(p.shape[1:]) for p in pictures if p.shape != right), None)
        if wrong is not None:
            raise DataError(
                f"--features: the network takes pictures of {right[1]}x{right[2]} pixels, and one "
                f"has {wrong[1]}x{wrong[0]}; resize the pictures first"
            )
    groups = itertools.groupby(pictures, key=lambda picture: picture.shape)
    return torch.cat([network(torch.stack(list(group)).to(device)) for _, group in groups])


def _fingerprint(paths: list[Path], features: Path, batch_size: int) -> str:
    """Twelve letters that differ where pictures, network or batch size do."""
    sums = hashlib.sha256(f"{digest(features)} {batch_size}".encode())
    for path in paths:
        state = path.stat()
        sums.update(f"\0{path.name}\0{state.st_size} {state.st_mtime_ns}".encode(errors="replace"))
    return sums.hexdigest()[:12]


def _save(statistics: FeatureStatistics, partial: Path) -> None:
    with written_aside(partial) as draft, draft.open("wb") as file:
        np.savez(
            file,
            count=statistics.count,
            mean=statistics.mean.cpu().numpy(),
            scatter=statistics.scatter.cpu().numpy(),
        )


def _resumed(partial: Path, size: int, device: torch.device) -> FeatureStatistics:
    """The sums that an earlier call saved, else empty ones. DataError for a file that is none."""
    statistics = FeatureStatistics(size, device)
    if is_absent(partial):
        return statistics
    remedy = "delete it, and the statistics are computed from the first picture on"
    with opened_untrusted(partial, remedy, DataError) as file:
        try:
            saved = read_npz(file)
            statistics.count = int(saved["count"])
            for name in ("mean", "scatter"):
                getattr(statistics, name).copy_(torch.from_numpy(saved[name].copy()))
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise DataError(f"{partial}: is damaged ({one_line(error)}); {remedy}") from error
    return statistics
