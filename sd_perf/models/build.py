"""The networks of a config, on their device."""

from __future__ import annotations

import torch

from sd_perf.config import Config, UNetConfig
from sd_perf.errors import ConfigError
from sd_perf.reference.unet import UNet


def build_unet(config: UNetConfig, seed: int, device: torch.device) -> UNet:
    """The UNet with its initial weights, float32: a function of the seed alone, whatever the device."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet(config)
    # NHWC is what tensor cores want; memory_format is missing from torch's annotations of Module.to
    layout = {"memory_format": torch.channels_last} if device.type == "cuda" else {}
    return unet.to(device, **layout)  # type: ignore[call-overload]


def build_text_encoder(config: Config, device: torch.device) -> torch.nn.Module:
    """The frozen text tower. Raises ConfigError where its states are not what the UNet takes."""
    from sd_perf.models.text_encoder import OpenClipTextEncoder  # open_clip takes seconds to import

    encoder = OpenClipTextEncoder(config.text_encoder).to(device)
    if encoder.width != config.model.context_dim:
        raise ConfigError(
            f"model.context_dim: {config.model.context_dim} cannot be used; it must be {encoder.width}, the width of "
            f"{config.text_encoder.model}'s states"
        )
    return encoder
