"""The Inception v3 of FID: 2048 features per image, with the weights that the benchmark names.

Szegedy et al. 2015 (arXiv 1512.00567), as in the TensorFlow model of 2015-12-05 that defines FID.
It differs from the paper: 1008 classes, no auxiliary head, average pools that leave the padding out
of the mean, and a max pool in the last block. Parameter names and shapes are those of pytorch-fid's
file (`pytorch_fid/inception.py`), which follow torchvision's.

Shape letters: B images, C channels, H rows, W columns.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import fuse_conv_bn_eval

from sd_perf.errors import CheckpointError
from sd_perf.files import one_line
from sd_perf.models.weight_files import load_into
from sd_perf.torch_files import require_bounded

WEIGHTS_FILE = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_SHA1 = "bd836944fd6db519dfd8d924aa457f5b3c8357ff"
NUM_FEATURES = 2048

Pool = Literal["average", "max", "max_stride_2"]


class Conv(NamedTuple):
    """One convolution: output channels, kernel (rows, columns), stride, padding (rows, columns)."""

    channels: int
    kernel: tuple[int, int]
    stride: int
    padding: tuple[int, int]


Layer = tuple[Conv, ...]
"""one convolution, or two over the same input whose outputs are concatenated"""


def _conv(channels: int, rows: int = 1, columns: int = 0, stride: int = 1) -> Layer:
    """A layer of one convolution: rows x columns kernel, square where no columns are given.

    It is padded to keep the size where the stride is 1, and not padded otherwise.
    """
    columns = columns or rows
    padding = (rows // 2, columns // 2) if stride == 1 else (0, 0)
    return (Conv(channels, (rows, columns), stride, padding),)


class ConvNorm(nn.Module):
    """Convolution without bias, BatchNorm (eps 1e-3), ReLU."""

    def __init__(self, in_channels: int, conv: Conv) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, *conv, bias=False)
        self.bn: nn.Module = nn.BatchNorm2d(conv.channels, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Parallel branches over one input and a pool; their outputs are concatenated in this order.

    The layers of a branch are named `<branch>_1`, `<branch>_2`, ..., with a and b added where a
    layer is two convolutions. The layer of a one-layer branch has the branch's name. Where there is
    a `branch_pool`, it takes the pool's output; otherwise that output is concatenated itself.
    """

    def __init__(self, in_channels: int, pool: Pool, branches: dict[str, list[Layer]]) -> None:
        super().__init__()
        self.pool = pool
        self.names: dict[str, list[list[str]]] = {}
        for branch, layers in branches.items():
            channels = in_channels
            self.names[branch] = []
            for number, layer in enumerate(layers, start=1):
                name = branch if len(layers) == 1 else f"{branch}_{number}"
                names = [name] if len(layer) == 1 else [name + "a", name + "b"]
                for own_name, conv in zip(names, layer, strict=True):
                    self.add_module(own_name, ConvNorm(channels, conv))
                channels = sum(conv.channels for conv in layer)
                self.names[branch].append(names)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = self._pooled(x)
        outputs = [
            self._branch(name, pooled if name == "branch_pool" else x) for name in self.names
        ]
        return torch.cat(outputs if "branch_pool" in self.names else [*outputs, pooled], 1)

    def _branch(self, branch: str, x: torch.Tensor) -> torch.Tensor:
        for names in self.names[branch]:
            x = torch.cat([self.get_submodule(name)(x) for name in names], 1)
        return x

    def _pooled(self, x: torch.Tensor) -> torch.Tensor:
        if self.pool == "average":
            return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        if self.pool == "max":
            return F.max_pool2d(x, 3, stride=1, padding=1)
        return F.max_pool2d(x, 3, stride=2)


def _mixed_5(in_channels: int, pool_channels: int) -> Mixed:
    branches: dict[str, list[Layer]] = {
        "branch1x1": [_conv(64)],
        "branch5x5": [_conv(48), _conv(64, 5)],
        "branch3x3dbl": [_conv(64), _conv(96, 3), _conv(96, 3)],
        "branch_pool": [_conv(pool_channels)],
    }
    return Mixed(in_channels, "average", branches)


def _mixed_6(inner: int) -> Mixed:
    branches: dict[str, list[Layer]] = {
        "branch1x1": [_conv(192)],
        "branch7x7": [_conv(inner), _conv(inner, 1, 7), _conv(192, 7, 1)],
        "branch7x7dbl": [
            _conv(inner),
            _conv(inner, 7, 1),
            _conv(inner, 1, 7),
            _conv(inner, 7, 1),
            _conv(192, 1, 7),
        ],
        "branch_pool": [_conv(192)],
    }
    return Mixed(768, "average", branches)


def _mixed_7(in_channels: int, pool: Pool) -> Mixed:
    fork = _conv(384, 1, 3) + _conv(384, 3, 1)
    branches: dict[str, list[Layer]] = {
        "branch1x1": [_conv(320)],
        "branch3x3": [_conv(384), fork],
        "branch3x3dbl": [_conv(448), _conv(384, 3), fork],
        "branch_pool": [_conv(192)],
    }
    return Mixed(in_channels, pool, branches)


def _shrink_6() -> Mixed:
    double = [_conv(64), _conv(96, 3), _conv(96, 3, stride=2)]
    return Mixed(
        288, "max_stride_2", {"branch3x3": [_conv(384, 3, stride=2)], "branch3x3dbl": double}
    )


def _shrink_7() -> Mixed:
    long = [_conv(192), _conv(192, 1, 7), _conv(192, 7, 1), _conv(192, 3, stride=2)]
    return Mixed(
        768,
        "max_stride_2",
        {"branch3x3": [_conv(192), _conv(320, 3, stride=2)], "branch7x7x3": long},
    )


class FidInception(nn.Module):
    """Images (B, 3, H, W) of any size, float in [0, 1] -> features (B, 2048); always in eval mode.

    Convolutions are in the dtype of the weights; features are float32. Raises ValueError for values
    outside [0, 1].
    """

    num_features = NUM_FEATURES

    def __init__(self) -> None:
        super().__init__()
        # The stem's convolutions are not all padded, so `_conv` does not describe them.
        self.Conv2d_1a_3x3 = ConvNorm(3, Conv(32, kernel=(3, 3), stride=2, padding=(0, 0)))
        self.Conv2d_2a_3x3 = ConvNorm(32, Conv(32, kernel=(3, 3), stride=1, padding=(0, 0)))
        self.Conv2d_2b_3x3 = ConvNorm(32, Conv(64, kernel=(3, 3), stride=1, padding=(1, 1)))
        self.Conv2d_3b_1x1 = ConvNorm(64, Conv(80, kernel=(1, 1), stride=1, padding=(0, 0)))
        self.Conv2d_4a_3x3 = ConvNorm(80, Conv(192, kernel=(3, 3), stride=1, padding=(0, 0)))
        self.Mixed_5b = _mixed_5(192, pool_channels=32)
        self.Mixed_5c = _mixed_5(256, pool_channels=64)
        self.Mixed_5d = _mixed_5(288, pool_channels=64)
        self.Mixed_6a = _shrink_6()
        self.Mixed_6b = _mixed_6(inner=128)
        self.Mixed_6c = _mixed_6(inner=160)
        self.Mixed_6d = _mixed_6(inner=160)
        self.Mixed_6e = _mixed_6(inner=192)
        self.Mixed_7a = _shrink_7()
        self.Mixed_7b = _mixed_7(1280, "average")
        self.Mixed_7c = _mixed_7(2048, "max")
        self.fc = nn.Linear(NUM_FEATURES, 1008)  # the weight file has it, FID does not use it
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not ((images >= 0) & (images <= 1)).all():  # also false for NaN
            raise ValueError("images must be in [0, 1]")
        x = F.interpolate(images, (299, 299), mode="bilinear", align_corners=False)
        # oneDNN and tensor cores both want NHWC; the layers below keep it.
        x = (2 * x - 1).contiguous(memory_format=torch.channels_last)
        x = x.to(self.Conv2d_1a_3x3.conv.weight.dtype)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(F.max_pool2d(x, 3, stride=2))))
        x = self.Mixed_6e(self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))))
        return self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x))).float().mean((2, 3))


def read_inception(path: Path, sha1: str | None = WEIGHTS_SHA1) -> FidInception:
    """The network with pytorch-fid's weights from a local file, frozen.

    `sha1` is the file's checksum (hex); None accepts any. Raises CheckpointError for a file that is
    missing, has another checksum, or holds other tensors.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file; it must be {WEIGHTS_FILE} of pytorch-fid's releases"
        )
    if sha1 is not None:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha1").hexdigest()
        if found != sha1:
            raise CheckpointError(
                f"{path}: its SHA-1 is {found}, that of {WEIGHTS_FILE} is {sha1}; get it again"
            )
    try:
        with path.open("rb") as file:
            require_bounded(file)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise many kinds
        raise CheckpointError(f"{path}: not a file of weights ({one_line(error)})") from error
    network = FidInception()
    load_into(network, state, "FID's Inception v3", path)
    return folded(network.requires_grad_(False))


def folded(network: FidInception) -> FidInception:
    """The network with its BatchNorms in the convolutions, channels-last; it gives the same.

    A frozen BatchNorm is a scale and a shift of each channel, which weight and bias of the
    convolution before it can hold.
    """
    for module in network.modules():
        if isinstance(module, ConvNorm):
            module.conv = fuse_conv_bn_eval(module.conv, module.bn)  # type: ignore[arg-type]
            module.bn = nn.Identity()
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
