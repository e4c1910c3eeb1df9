"""Fréchet distance: the eigenvalue route of sd_perf against scipy.linalg.sqrtm, the benchmark's
reference, in one run.

    python -m benchmarks.frechet_distance [--output FILE.json]

Two pairs of Gaussians of 2048 features, seeded: both covariances of full rank, and one of fewer
samples than features. The routes take turns; times are medians in seconds, with the same number of
threads for both. Needs scipy.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy
import scipy.linalg
import torch

from sd_perf.evaluation.fid import FeatureStatistics, Gaussian, frechet_distance
from sd_perf.files import write_json

CASES = {"full rank": 4, "rank-deficient": 0.5}
"""samples of the first Gaussian per feature; the second has 4"""
AGREEMENT = 1e-6
"""largest relative difference of the two routes that is called equal"""


def gaussian(samples: int, features: int, seed: int) -> Gaussian:
    """Of correlated, off-centre features (samples, features) with a spectrum over three decades."""
    generator = torch.Generator().manual_seed(seed)
    mixing = (
        torch.randn(features, features, generator=generator, dtype=torch.float64) / features**0.5
    )
    scales = torch.logspace(0, -3, features, dtype=torch.float64)
    noise = torch.randn(samples, features, generator=generator, dtype=torch.float64)
    drawn = FeatureStatistics(features)
    drawn.update((noise * scales) @ mixing + 0.01 * seed)
    return drawn.gaussian()


def by_sqrtm(a: Gaussian, b: Gaussian) -> float:
    """As pytorch-fid computes it: the real part of scipy's square root of the product."""
    root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy()).real
    traces = a.covariance.trace() + b.covariance.trace()
    return ((a.mean - b.mean).square().sum() + traces).item() - 2 * float(np.trace(root))


def timed(
    distance: Callable[[Gaussian, Gaussian], float], pair: tuple[Gaussian, Gaussian]
) -> tuple[float, float]:
    """Seconds, and the distance."""
    start = time.perf_counter()
    value = distance(*pair)
    return time.perf_counter() - start, value


def compare(features: int, samples_per_feature: float, repeats: int) -> dict[str, float]:
    """Median seconds of both routes, their ratio, and the relative difference of the distances."""
    pair = (
        gaussian(round(features * samples_per_feature), features, 1),
        gaussian(4 * features, features, 2),
    )
    runs = [(timed(frechet_distance, pair), timed(by_sqrtm, pair)) for _ in range(repeats)]
    ours, theirs = (statistics.median(run[i][0] for run in runs) for i in (0, 1))
    (_, value), (_, expected) = runs[0]
    return {
        "eigenvalues_s": ours,
        "sqrtm_s": theirs,
        "ratio": theirs / ours,
        "difference": abs(value / expected - 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=2048, help="features per sample")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each route")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    results = {name: compare(options.features, per, options.repeats) for name, per in CASES.items()}
    versions = {"torch": torch.__version__, "scipy": scipy.__version__, "numpy": np.__version__}
    machine = {"platform": platform.platform(), "threads": torch.get_num_threads()}
    print(f"{options.features} features, {machine['threads']} threads, {versions}")
    for name, row in results.items():
        print(
            f"{name:15s} eigenvalues {row['eigenvalues_s']:7.2f} s   sqrtm {row['sqrtm_s']:7.2f} "
            "s   "
            f"ratio {row['ratio']:5.2f}   relative difference {row['difference']:.1e}"
        )
    if options.output:
        write_json(
            options.output,
            {"features": options.features, "results": results, **versions, **machine},
        )
    return 0 if all(row["difference"] < AGREEMENT for row in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
