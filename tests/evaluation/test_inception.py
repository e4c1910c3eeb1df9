"""FID's Inception against torchvision's with the same changes; its weight file."""

import hashlib
from pathlib import Path

import pytest
import torch

from sd_perf.errors import CheckpointError
from sd_perf.evaluation.inception import FidInception, read_inception
from sd_perf.models.torchvision_schemas import define_missing_torchvision_ops

define_missing_torchvision_ops()
inception = pytest.importorskip("torchvision.models.inception")
F = torch.nn.functional


def patched(block: torch.nn.Module, pool) -> None:
    """torchvision's block with the pool of FID's network.

    Its forward is written out here, with another pool.
    """
    original = block._forward

    def forward(x):
        *branches, _ = original(x)
        return [*branches, block.branch_pool(pool(x))]

    block._forward = forward


def average(x):
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


@pytest.fixture(scope="module")
def theirs() -> torch.nn.Module:
    """torchvision's Inception3 with FID's changes.

    Its random weights keep the size of the activations.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = inception.Inception3(num_classes=1008, aux_logits=False, init_weights=False).eval()
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight)
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(1e-3, 1.0)
                module.weight.data.uniform_(0.2, 0.6)
                module.bias.data.normal_(std=0.1)
    for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
        patched(getattr(model, f"Mixed_{name}"), average)
    patched(model.Mixed_7c, lambda x: F.max_pool2d(x, 3, stride=1, padding=1))
    model.fc = torch.nn.Identity()
    return model


@pytest.fixture(scope="module")
def weights(theirs, tmp_path_factory) -> Path:
    state = {
        **theirs.state_dict(),
        "fc.weight": torch.zeros(1008, 2048),
        "fc.bias": torch.zeros(1008),
    }
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(state, path)
    return path


def test_names_and_shapes_are_torchvisions():
    with torch.device("meta"):
        model = inception.Inception3(num_classes=1008, aux_logits=False, init_weights=False)
        ours = FidInception()
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == shapes


@torch.no_grad()
def test_features_are_torchvisions_with_the_patches(theirs, weights):
    network = read_inception(weights, sha1=None)
    images = torch.rand(2, 3, 70, 90, generator=torch.Generator().manual_seed(1))
    expected = theirs(
        2 * F.interpolate(images, (299, 299), mode="bilinear", align_corners=False) - 1
    )
    features = network(images)
    assert features.shape == (2, 2048)
    assert expected.std() > 1e-2  # random weights that let something through
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("value", [-0.1, 1.1, 255.0, float("nan")])
def test_images_outside_the_range_are_refused(value):
    with torch.device("meta"):
        network = FidInception()
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        network(torch.full((1, 3, 8, 8), value))


def test_checksum(weights):
    with pytest.raises(CheckpointError, match="SHA-1"):
        read_inception(weights)
    read_inception(weights, hashlib.sha1(weights.read_bytes()).hexdigest())


def test_bad_files(tmp_path):
    with pytest.raises(CheckpointError, match="no such file"):
        read_inception(tmp_path / "absent.pth")
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match="not a file of weights"):
        read_inception(damaged, sha1=None)
    torch.save({"conv.weight": torch.zeros(1)}, damaged)
    with pytest.raises(CheckpointError, match="missing"):
        read_inception(damaged, sha1=None)
