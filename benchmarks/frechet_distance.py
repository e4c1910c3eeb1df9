"""Time of the Fréchet distance: by eigenvalues, as sd_perf does, and by scipy's matrix square root.

    python -m benchmarks.frechet_distance [--output FILE.json]

The square root (scipy.linalg.sqrtm) is the way of the benchmark's reference. Two pairs of seeded
Gaussians of 2048 features: in one both covariances have full rank, in the other one is of fewer
samples than features. The two ways take turns, with the same number of threads; times are medians.
Needs scipy. Exit code 1: the distances differ.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import scipy
import scipy.linalg
import torch

from benchmarks.command import command_parser
from sd_perf.evaluation.fid import FeatureStatistics, Gaussian, frechet_distance
from sd_perf.tools.results import Conditions, Provenance, Result, write

CASES = {"full rank": 4, "rank-deficient": 0.5}
"""samples of the first Gaussian per feature; the second has 4"""
AGREEMENT = 1e-6
"""largest relative difference of the two distances that is called equal"""


class DistanceRow(Conditions):
    """Both ways on one pair of Gaussians."""

    case: str
    features: int
    eigenvalues_s: float
    """median seconds by eigenvalues"""
    sqrtm_s: float
    """median seconds by the matrix square root"""
    ratio: float
    """`sqrtm_s` over `eigenvalues_s`"""
    difference: float
    """relative, of the two distances"""


def gaussian(samples: int, features: int, seed: int) -> Gaussian:
    """Gaussian of drawn features (samples, features), float64.

    They are correlated and off-centre, with a spectrum over three decades.
    """
    normal = partial(
        torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    mixing = normal(features, features) / features**0.5
    scales = torch.logspace(0, -3, features, dtype=torch.float64)
    drawn = FeatureStatistics(features)
    drawn.update((normal(samples, features) * scales) @ mixing + 0.01 * seed)
    return drawn.gaussian()


def by_sqrtm(a: Gaussian, b: Gaussian) -> float:
    """Distance as pytorch-fid computes it: by the real part of scipy's square root."""
    root = scipy.linalg.sqrtm((a.covariance @ b.covariance).numpy()).real
    traces = a.covariance.trace() + b.covariance.trace()
    return ((a.mean - b.mean).square().sum() + traces).item() - 2 * float(np.trace(root))


def timed(
    distance: Callable[[Gaussian, Gaussian], float], pair: tuple[Gaussian, Gaussian]
) -> tuple[float, float]:
    """Seconds of one call, and the distance."""
    start = time.perf_counter()
    value = distance(*pair)
    return time.perf_counter() - start, value


def compare(case: str, features: int, repeats: int) -> DistanceRow:
    """Time both ways in turns on one pair of Gaussians. case: key of `CASES`."""
    samples = round(features * CASES[case])
    pair = gaussian(samples, features, seed=1), gaussian(4 * features, features, seed=2)
    runs = [(timed(frechet_distance, pair), timed(by_sqrtm, pair)) for _ in range(repeats)]
    eigenvalues, sqrtm = (statistics.median(run[i][0] for run in runs) for i in (0, 1))
    (_, value), (_, expected) = runs[0]
    return {
        "batch": None,
        "dtype": "float64",
        "cached": "means and covariances of both sets",
        "case": case,
        "features": features,
        "eigenvalues_s": eigenvalues,
        "sqrtm_s": sqrtm,
        "ratio": sqrtm / eigenvalues,
        "difference": abs(value / expected - 1),
    }


def main() -> int:
    """Measure, print, write; returns the exit code."""
    parser = command_parser("frechet_distance", __doc__)
    parser.add_argument("--features", type=int, default=2048, help="features per sample")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each way")
    parser.add_argument("--output", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    rows = [compare(case, options.features, options.repeats) for case in CASES]
    versions = {"torch": torch.__version__, "scipy": scipy.__version__, "numpy": np.__version__}
    machine = {"platform": platform.platform(), "threads": torch.get_num_threads()}
    print(f"{options.features} features, {machine['threads']} threads, {versions}")
    for row in rows:
        times = f"eigenvalues {row['eigenvalues_s']:7.2f} s   sqrtm {row['sqrtm_s']:7.2f} s"
        difference = f"relative difference {row['difference']:.1e}"
        print(f"{row['case']:15s} {times}   ratio {row['ratio']:5.2f}   {difference}")
    if options.output:
        provenance = Provenance.of_this_run("frechet_distance", machine, versions)
        write(options.output, Result("frechet_distance", provenance, rows))
    return 0 if all(row["difference"] < AGREEMENT for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
