"""The config's UNet as an `Architecture` of sd_kernels, from which ops derive their calls."""

from __future__ import annotations

from functools import cache

import torch

from sd_kernels.sd_v2_shapes import Architecture
from sd_perf.config import Config
from sd_perf.reference.unet import UNet


@cache  # asked by every choice of kernels
def architecture(config: Config) -> Architecture:
    """The sizes of the config's UNet; parameters are counted on the meta device."""
    model = config.model
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in UNet(model).parameters())
    levels = range(len(model.channel_mult))
    return Architecture(
        stem=model.model_channels,
        widths=tuple(mult * model.model_channels for mult in model.channel_mult),
        side=config.data.latent_size,
        transformer_levels=tuple(
            level for level in levels if 2**level in model.attention_resolutions
        ),
        blocks=model.num_res_blocks,
        head_dim=model.num_head_channels,
        context_length=config.data.context_tokens,
        context_width=model.context_dim,
        in_channels=model.in_channels,
        out_channels=model.out_channels,
        block_groups=model.resblock_groups,
        transformer_groups=model.transformer_groups,
        parameters=parameters,
    )
