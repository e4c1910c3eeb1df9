"""The small feature network that replaces Inception in the FID of the tiny world.

Its distances are comparable with one another, at equal numbers of pictures, and with nothing else.

Shape letters: B pictures, C channels, H and W rows and columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from sd_perf.models.weight_files import filled, read_ldm_checkpoint, safetensors_config


@dataclass(frozen=True)
class FeatureNetConfig:
    """Sizes of the feature net."""

    widths: tuple[int, ...] = (16, 32, 64, 64)
    """channels of each level; every level halves height and width"""
    features: int = 64
    """length of a picture's feature vector"""
    image_size: int = 64
    """rows and columns of the pictures, pixels"""


class FeatureNet(nn.Module):
    """Strided convolutions: pictures (B, 3, H, W) in [0, 1] -> features (B, config.features)."""

    def __init__(self, config: FeatureNetConfig | None = None) -> None:
        super().__init__()
        self.config = config or FeatureNetConfig()
        self.num_features = self.config.features
        widths = self.config.widths
        self.levels = nn.ModuleList(
            nn.Conv2d(channels, width, kernel_size=3, stride=2, padding=1)
            for channels, width in zip((3, *widths[:-1]), widths, strict=True)
        )
        side = self.config.image_size // 2 ** len(widths)
        self.head = nn.Linear(widths[-1] * side * side, self.config.features)

    def forward(self, images: Tensor) -> Tensor:
        x = images * 2 - 1
        for level in self.levels:
            x = F.silu(level(x))
        return self.head(x.flatten(1))


def read_feature_net(path: str | Path) -> FeatureNet:
    """The frozen network in a .safetensors file, with the config that its metadata holds.

    Raises CheckpointError for any other file.
    """
    path = Path(path)
    config, state = safetensors_config(path, FeatureNetConfig), read_ldm_checkpoint(path)
    net = filled(lambda: FeatureNet(config), state, "the feature net", path)
    return net.requires_grad_(False).eval()
