"""FID's statistics of a folder: pytorch-fid's arithmetic, stopping and going on, bad pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sd_perf.errors import DataError
from sd_perf.evaluation import folder_statistics
from sd_perf.evaluation.fid import Gaussian
from sd_perf.evaluation.folder_statistics import write_folder_statistics
from sd_perf.evaluation.inception import FidInception

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")
CPU = torch.device("cpu")
NET = Path(__file__).parent.parent.parent / "assets" / "tiny" / "features.safetensors"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Ten pictures of 64x64 pixels, every third grey, and a file that is none."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (10, 64, 64, 3)).astype(np.uint8)
    for number, pixels in enumerate(noise):
        picture = Image.fromarray(pixels)
        if number % 3 == 0:
            picture = picture.convert("L")
        picture.save(folder / f"{number}.jpg")
    (folder / "captions.jsonl").write_text("{}\n")
    return folder


def as_pytorch_fid(folder: Path, network: torch.nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """NumPy's mean and covariance of features in float64, picture by picture as pytorch-fid
    reads them: RGB by Pillow, values / 255."""
    rows = []
    for path in sorted(folder.glob("*.jpg")):
        with Image.open(path) as picture:
            pixels = np.asarray(picture.convert("RGB")).transpose(2, 0, 1)
        with torch.no_grad():
            rows.append(network(torch.tensor(pixels)[None] / 255)[0].double().numpy())
    return np.mean(rows, axis=0), np.cov(np.array(rows), rowvar=False)


def test_statistics_are_those_of_pytorch_fid(pictures, tmp_path, monkeypatch):
    """With FID's Inception: its weights are not to be had here, so random ones that scale well."""
    torch.manual_seed(0)
    network = FidInception().requires_grad_(False)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    monkeypatch.setattr(folder_statistics, "read_features", lambda path, device: network)
    for path in sorted(pictures.glob("*.jpg"))[3:]:
        path.unlink()
    out = tmp_path / "new" / "statistics.npz"
    assert write_folder_statistics(pictures, out, NET, device=CPU, batch_size=2) == 3
    mean, covariance = as_pytorch_fid(pictures, network)
    with np.load(out) as ours:
        assert ours["mu"].dtype == ours["sigma"].dtype == np.float64
        assert ours["mu"].shape == (2048,) and ours["sigma"].shape == (2048, 2048)
        np.testing.assert_allclose(ours["mu"], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(
            ours["sigma"], covariance, rtol=1e-3, atol=1e-4 * np.abs(covariance).max()
        )


def test_a_stopped_call_goes_on_to_the_same_bits(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_statistics, "_SAVE_EVERY", 2)
    whole, stopped = tmp_path / "whole.npz", tmp_path / "stopped.npz"
    options = {"device": CPU, "batch_size": 2, "threads": 2}
    write_folder_statistics(pictures, whole, NET, **options)

    def stop(done: int, of: int) -> None:
        assert of == 10
        if done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder_statistics(pictures, stopped, NET, **options, progress=stop)
    [partial] = tmp_path.glob("stopped.npz.partial_*")
    done: list[int] = []
    write_folder_statistics(
        pictures, stopped, NET, **options, progress=lambda count, of: done.append(count)
    )
    assert done == [6, 8, 10] and not partial.exists()
    ours, theirs = Gaussian.load_npz(stopped), Gaussian.load_npz(whole)
    assert torch.equal(ours.mean, theirs.mean) and torch.equal(ours.covariance, theirs.covariance)


def test_other_pictures_are_another_call(pictures, tmp_path, monkeypatch):
    """What was saved of one set of pictures is not taken for that of another."""
    monkeypatch.setattr(folder_statistics, "_SAVE_EVERY", 1)
    out = tmp_path / "out.npz"
    Image.new("RGB", (64, 64)).save(pictures / "a.png")
    (pictures / "b.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"b\.png: cannot be decoded"):
        write_folder_statistics(pictures, out, NET, device=CPU, batch_size=2, threads=1)
    [partial] = tmp_path.glob("out.npz.partial_*")
    (pictures / "b.png").unlink()
    done: list[int] = []
    assert (
        write_folder_statistics(
            pictures,
            out,
            NET,
            device=CPU,
            batch_size=2,
            progress=lambda count, of: done.append(count),
        )
        == 11
    )
    assert done[0] == 2 and partial.exists()


def test_a_damaged_record(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_statistics, "_fingerprint", lambda *_: "x")
    partial = tmp_path / "out.npz.partial_x"
    for content in (b"", b"PK\3\4"):
        partial.write_bytes(content)
        with pytest.raises(DataError, match=r"partial_x: is damaged .* delete it"):
            write_folder_statistics(pictures, tmp_path / "out.npz", NET, device=CPU)


def test_nothing_is_overwritten_and_no_folder_is_empty(pictures, tmp_path):
    out = tmp_path / "out.npz"
    with pytest.raises(DataError, match=r"holds no pictures \(\*\.bmp, "):
        write_folder_statistics(tmp_path, out, NET, device=CPU)
    out.write_bytes(b"x")
    with pytest.raises(DataError, match="is there already"):
        write_folder_statistics(pictures, out, NET, device=CPU)


def test_pictures_of_another_size_than_the_network_takes(pictures, tmp_path):
    Image.new("RGB", (30, 20)).save(pictures / "a.png")
    with pytest.raises(DataError, match=r"--features: .* 64x64 pixels, and one has 30x20"):
        write_folder_statistics(pictures, tmp_path / "out.npz", NET, device=CPU)
