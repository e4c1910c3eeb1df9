"""The feature net: shapes, its file, and bad files."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

from sd_perf.errors import CheckpointError
from sd_perf.evaluation.feature_net import FeatureNet, FeatureNetConfig, read_feature_net


def write(path, state, config):
    save_file(state, path, None if config is None else {"config": json.dumps(config)})
    return path


def test_a_net_comes_back_from_its_file(tmp_path):
    config = FeatureNetConfig(widths=(4, 8), features=5, image_size=16)
    net = FeatureNet(config)
    path = write(tmp_path / "f.safetensors", net.half().state_dict(), dataclasses.asdict(config))
    read = read_feature_net(path)
    assert (
        read.config == config
        and not read.training
        and not any(p.requires_grad for p in read.parameters())
    )
    images = torch.rand(3, 3, 16, 16)
    features = read(images)
    assert features.shape == (3, 5) and features.dtype == torch.float32
    torch.testing.assert_close(features, net.float()(images))
    torch.testing.assert_close(features[1:2], read(images[1:2]), rtol=1e-4, atol=1e-5)


def test_unusable_files(tmp_path):
    state = FeatureNet().state_dict()
    with pytest.raises(CheckpointError, match="feature net"):
        read_feature_net(write(tmp_path / "other.safetensors", state, {"widths": [8, 8]}))
    with pytest.raises(CheckpointError, match="no FeatureNetConfig"):
        read_feature_net(write(tmp_path / "kind.safetensors", state, {"channels": 8}))
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_feature_net(tmp_path / "absent.safetensors")
