"""Upsampling that is merged with its convolution, for a decoder that draws pictures on a CPU.

A convolution of an image that nearest upsampling doubled takes 4/9 of the operations on the small
image, with merged weights (`sd_kernels.upsample_conv.merged`); only rounding differs.

Shape letters: B pictures, C and K channels, H and W rows and columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from sd_kernels.upsample_conv.merged import interleave, merge
from sd_perf.models.vae import Upsample


class MergedUpsample(nn.Module):
    """`Upsample` of the autoencoder, channels-last: (B, C, H, W) -> (B, K, 2H, 2W).

    The weights are merged once, as they are when it is made.
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv
        assert conv.bias is not None
        self.register_buffer("weight", merge(conv.weight.detach()), persistent=False)
        self.register_buffer("bias", conv.bias.detach().repeat(4), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return interleave(F.conv2d(x, self.weight, self.bias, padding=1))


def merge_upsampling(network: nn.Module) -> None:
    """Replace all upsampling of an autoencoder by the merged one, in place; names stay."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if isinstance(child, Upsample):
                setattr(module, name, MergedUpsample(child.conv))
