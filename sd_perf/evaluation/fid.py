"""FID: the Fréchet distance between the Gaussians of two sets of features.

Heusel et al. 2017 (arXiv 1706.08500), equation 6, after Dowson & Landau 1982:

    d² = |μa − μb|² + tr A + tr B − 2 tr √(AB),  with means μa, μb and covariances A, B.

AB is not symmetric, but it has the eigenvalues of √A B √A, which is symmetric and positive
semidefinite. So tr √(AB) is the sum of the square roots of those eigenvalues, and two symmetric
eigendecompositions replace the matrix square root: first A = U diag(a) Uᵀ, then the eigenvalues of
C = S B Sᵀ with S = diag(√a) Uᵀ. Rows of S whose eigenvalue is zero up to rounding are left out, so
a covariance of fewer samples than features costs less.

Shape letters: B samples of a batch, D features.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from sd_perf.data.npz import read_npz
from sd_perf.errors import DataError
from sd_perf.files import one_line, written_aside

_ROUNDING = torch.finfo(torch.float64).eps
_INDEFINITE = 1e-5
"""Share of the largest eigenvalue below which a negative one is taken for damage. A covariance
stored in float32 has eigenvalues down to about -1e-6 of the largest."""

_MAX_BYTES, _MAX_FEATURES = 2**26, 2048
"""what a compressed file of statistics may unpack to, and features that it may be of, more than
which take minutes and gigabytes; FID's Inception has 2,048, which need 34 MB"""


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean (D,) and covariance (D, D), float64, of features.

    Raises DataError where the shapes differ, a value is not finite, or the covariance is not
    symmetric.
    """

    mean: torch.Tensor
    covariance: torch.Tensor

    def __post_init__(self) -> None:
        size = self.mean.numel()
        if self.mean.shape != (size,) or self.covariance.shape != (size, size):
            raise DataError(
                f"feature statistics: a mean of shape {tuple(self.mean.shape)} and a covariance "
                "of shape "
                f"{tuple(self.covariance.shape)} do not belong together"
            )
        if not (self.mean.isfinite().all() and self.covariance.isfinite().all()):
            raise DataError(
                "feature statistics: hold NaN or infinity; look for it in the images and the "
                "features"
            )
        asymmetry = (self.covariance - self.covariance.T).abs().max()
        if asymmetry > _INDEFINITE * self.covariance.abs().max():
            raise DataError(
                "feature statistics: the covariance is not symmetric; the file is damaged"
            )

    def save_npz(self, path: Path) -> None:
        """Write `mu` (D,) and `sigma` (D, D), float64, as pytorch-fid and the benchmark do."""
        # Written to an open file, since numpy would append .npz to another name.
        with written_aside(path) as draft, draft.open("wb") as file:
            np.savez(file, mu=self.mean.cpu().numpy(), sigma=self.covariance.cpu().numpy())

    @classmethod
    def load_npz(cls, path: Path) -> Gaussian:
        """Read `mu` and `sigma`; DataError for a file that is missing, damaged or another kind."""
        if not path.is_file():
            raise DataError(
                f"{path}: no such file; give an .npz file of feature statistics (arrays mu and "
                "sigma)"
            )
        try:
            with path.open("rb") as file:
                arrays = read_npz(file, _MAX_BYTES)
            size = max(arrays["mu"].size, math.isqrt(arrays["sigma"].size))
            if size > _MAX_FEATURES:
                raise ValueError(f"of {size:,} features, more than {_MAX_FEATURES:,}")
            mean, covariance = (
                torch.from_numpy(arrays[name].astype(np.float64)) for name in ("mu", "sigma")
            )
        except Exception as error:  # zip, numpy and missing arrays raise many kinds
            raise DataError(
                f"{path}: not a file of feature statistics ({one_line(error)})"
            ) from error
        try:
            return cls(mean, covariance)
        except DataError as error:
            raise DataError(f"{path}: {error}") from error


class FeatureStatistics:
    """Streaming mean and covariance in float64, combined batch by batch.

    The pairwise update of Chan, Golub & LeVeque 1983, "Algorithms for Computing the Sample
    Variance", for vectors.
    """

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(size, size, dtype=torch.float64, device=device)
        """sum of (x - mean)(x - mean)ᵀ"""

    def update(self, features: torch.Tensor) -> None:
        """Add features (B, D) of any float dtype, on any device; ValueError for another shape."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features must be (B, {len(self.mean)}), not {tuple(features.shape)}")
        count, total = len(features), self.count + len(features)
        if count == 0:
            return
        features = features.detach().to(self.mean)
        mean = features.mean(0)
        centred, offset = features - mean, mean - self.mean
        self.scatter += centred.T @ centred
        self.scatter.addr_(offset, offset, alpha=self.count * count / total)
        self.mean += offset * (count / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """Mean and unbiased covariance, on the CPU.

        Raises DataError for fewer than 2 samples, and for features that are not finite.
        """
        if self.count < 2:
            raise DataError(
                f"feature statistics: {self.count} samples have no covariance; give at least 2"
            )
        return Gaussian(self.mean.cpu(), (self.scatter / (self.count - 1)).cpu())


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Squared Fréchet distance, at least 0, of two Gaussians of equally many features.

    Raises DataError where the numbers of features differ, or a covariance has an eigenvalue below
    -1e-5 of its largest. Smaller negative eigenvalues are rounding and count as 0. Nothing is added
    to the diagonals.
    """
    if len(a.mean) != len(b.mean):
        raise DataError(
            f"feature statistics of {len(a.mean)} and of {len(b.mean)} features cannot be "
            "compared; "
            f"make both with the same feature network"
        )
    values, vectors = torch.linalg.eigh(a.covariance)
    _require_semidefinite(values)
    # The error of an eigenvalue is a small multiple of the largest one's rounding.
    kept = values > 16 * _ROUNDING * values[-1]
    root = values[kept].sqrt()[:, None] * vectors[:, kept].T
    product = root @ b.covariance @ root.T
    cross = 0.0
    if kept.any():
        eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2)
        _require_semidefinite(eigenvalues)
        cross = eigenvalues.clamp(min=0).sqrt().sum().item()
    means = (a.mean - b.mean).square().sum().item()
    return max(means + a.covariance.trace().item() + b.covariance.trace().item() - 2 * cross, 0.0)


def _require_semidefinite(eigenvalues: torch.Tensor) -> None:
    """DataError where the smallest of ascending eigenvalues is negative by more than rounding."""
    if eigenvalues[0] < -_INDEFINITE * eigenvalues.abs().max():
        lowest, highest = eigenvalues[0].item(), eigenvalues[-1].item()
        raise DataError(
            f"feature statistics: a covariance has eigenvalues from {lowest:.3g} to "
            f"{highest:.3g}, but "
            f"none may be below 0; the file is damaged"
        )
