"""Fréchet distance: scipy, closed forms, streaming statistics, and bad files."""

import numpy as np
import pytest
import torch

from sd_perf.errors import DataError
from sd_perf.evaluation.fid import FeatureStatistics, Gaussian, frechet_distance
from sd_perf.models.torchvision_schemas import define_missing_torchvision_ops


def features(count: int, size: int, seed: int) -> torch.Tensor:
    """Correlated features with a mean and a spectrum over five decades, as real ones have."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    scales = torch.logspace(0, -5, size, dtype=torch.float64)
    noise = torch.randn(count, size, generator=generator, dtype=torch.float64) * scales
    return noise @ mixing + seed * 0.1 + 0.4


def statistics(*batches: torch.Tensor) -> FeatureStatistics:
    streamed = FeatureStatistics(batches[0].shape[1])
    for batch in batches:
        streamed.update(batch)
    return streamed


def by_sqrtm(a: torch.Tensor, b: torch.Tensor) -> float:
    """The benchmark's definition, computed from the samples with numpy and scipy alone."""
    linalg = pytest.importorskip("scipy.linalg")
    mu, sigma = zip(
        *((x.numpy().mean(0), np.cov(x.numpy(), rowvar=False)) for x in (a, b)), strict=True
    )
    root = linalg.sqrtm(sigma[0] @ sigma[1]).real
    return float(
        np.sum((mu[0] - mu[1]) ** 2) + np.trace(sigma[0]) + np.trace(sigma[1]) - 2 * np.trace(root)
    )


def test_statistics_stream():
    samples = features(301, 24, 0)
    streamed = statistics(*samples.split([1, 100, 0, 150, 50])).gaussian()
    np.testing.assert_allclose(streamed.mean.numpy(), samples.numpy().mean(0), rtol=1e-12)
    expected = np.cov(samples.numpy(), rowvar=False)
    np.testing.assert_allclose(streamed.covariance.numpy(), expected, rtol=1e-10, atol=1e-12)


def test_statistics_survive_a_large_mean():
    samples = features(200, 8, 0)
    shifted = statistics(*(samples + 1e6).split(20)).gaussian().covariance
    torch.testing.assert_close(shifted, samples.T.cov(), rtol=1e-6, atol=1e-8)


def test_statistics_take_float16():
    samples = features(64, 8, 0).half()
    assert torch.equal(
        statistics(samples).gaussian().mean, statistics(samples.double()).gaussian().mean
    )


@pytest.mark.parametrize("count", [400, 20], ids=["full rank", "rank-deficient"])
def test_distance_is_sqrtms(count):
    a, b = features(count, 48, 0), features(300, 48, 1)
    expected = by_sqrtm(a, b)
    assert expected > 1
    pairs = statistics(a).gaussian(), statistics(b).gaussian()
    assert frechet_distance(*pairs) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(*reversed(pairs)) == pytest.approx(expected, rel=1e-6)


def test_distance_is_torchmetrics():
    define_missing_torchvision_ops()
    library = pytest.importorskip("torchmetrics.image.fid")
    a, b = statistics(features(400, 48, 0)).gaussian(), statistics(features(300, 48, 1)).gaussian()
    expected = library._compute_fid(a.mean, a.covariance, b.mean, b.covariance).item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_distance_in_closed_form():
    """Diagonal covariances give the sum of squared differences of standard deviations.

    Equal Gaussians give 0, also where the covariance is singular.
    """
    a = Gaussian(
        torch.tensor([1.0, 0.0, 2.0]).double(), torch.diag(torch.tensor([4.0, 0.0, 1.0]).double())
    )
    b = Gaussian(
        torch.tensor([0.0, 0.0, 0.0]).double(), torch.diag(torch.tensor([1.0, 9.0, 0.0]).double())
    )
    assert frechet_distance(a, b) == pytest.approx(5 + 1 + 9 + 1, abs=1e-12)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-12)
    constant = Gaussian(torch.zeros(3).double(), torch.zeros(3, 3).double())
    assert frechet_distance(constant, a) == frechet_distance(a, constant) == pytest.approx(5 + 5)


def test_rounded_covariance_is_taken_and_an_indefinite_one_is_not():
    a = statistics(features(20, 48, 0)).gaussian()
    rounded = Gaussian(a.mean, a.covariance.float().double())
    assert torch.linalg.eigvalsh(rounded.covariance)[0] < 0
    assert frechet_distance(rounded, a) < 1e-2 * a.covariance.trace()
    indefinite = Gaussian(
        a.mean, a.covariance - 0.01 * a.covariance.trace() * torch.eye(48).double()
    )
    for pair in ((indefinite, a), (a, indefinite)):
        with pytest.raises(DataError, match="eigenvalue"):
            frechet_distance(*pair)


def test_npz(tmp_path):
    a = statistics(features(30, 8, 0)).gaussian()
    a.save_npz(tmp_path / "stats.bin")
    with np.load(tmp_path / "stats.bin") as arrays:
        assert sorted(arrays) == ["mu", "sigma"] and arrays["sigma"].dtype == np.float64
    loaded = Gaussian.load_npz(tmp_path / "stats.bin")
    assert torch.equal(loaded.mean, a.mean) and torch.equal(loaded.covariance, a.covariance)


def test_bad_npz(tmp_path):
    path = tmp_path / "stats.npz"
    with pytest.raises(DataError, match=r"stats\.npz: no such file"):
        Gaussian.load_npz(path)
    path.write_bytes(b"PK\x03\x04 cut off")
    with pytest.raises(DataError, match="not a file of feature statistics"):
        Gaussian.load_npz(path)
    np.savez(path, mu=np.zeros(3))
    with pytest.raises(DataError, match=r"stats\.npz: not a file .*sigma"):
        Gaussian.load_npz(path)
    np.savez(path, mu=np.zeros(3), sigma=np.zeros((2, 2)))
    with pytest.raises(DataError, match=r"stats\.npz: .*do not belong together"):
        Gaussian.load_npz(path)
    np.savez(path, mu=np.zeros(2), sigma=np.array([[1.0, 0.5], [0.0, 1.0]]))
    with pytest.raises(DataError, match="not symmetric"):
        Gaussian.load_npz(path)
    # a small file, and gigabytes of float64
    np.savez_compressed(path, mu=np.zeros(2), sigma=np.zeros((6000, 6000), np.uint8))
    with pytest.raises(DataError, match=r"of 6,000 features, more than 2,048"):
        Gaussian.load_npz(path)


def test_bad_features():
    with pytest.raises(DataError, match="1 samples"):
        statistics(features(1, 4, 0)).gaussian()
    with pytest.raises(DataError, match="NaN or infinity"):
        statistics(torch.full((3, 4), torch.inf)).gaussian()
    with pytest.raises(ValueError, match=r"\(B, 4\)"):
        FeatureStatistics(4).update(torch.zeros(3, 5))
    pair = statistics(features(9, 4, 0)).gaussian(), statistics(features(9, 5, 0)).gaussian()
    with pytest.raises(DataError, match="of 4 and of 5 features"):
        frechet_distance(*pair)
