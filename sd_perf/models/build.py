"""The networks of a config, on their device."""

from __future__ import annotations

from dataclasses import replace

import torch

from sd_kernels.spec import Target
from sd_perf.config import Config, KernelsConfig, PrecisionConfig
from sd_perf.fast.choice import choose_kernels
from sd_perf.fast.unet import FastUNet, Ops
from sd_perf.reference.unet import UNet


def build_unet(config: Config, seed: int, device: torch.device) -> torch.nn.Module:
    """The UNet with its initial weights, float32: a function of the seed alone, whatever device and
    implementation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if config.model.implementation == "plain":
            unet: torch.nn.Module = UNet(config.model)
        else:
            ops = Ops.chosen(choose_kernels(config, Target.here()))
            unet = FastUNet(config.model, ops, config.precision)
    # NHWC is what tensor cores want; memory_format is missing from torch's annotations of Module.to
    layout = {"memory_format": torch.channels_last} if device.type == "cuda" else {}
    unet = unet.to(device, **layout)  # type: ignore[call-overload]
    if config.model.compile:
        unet.compile(fullgraph=True, dynamic=False)  # in place: the names of parameters stay
    return unet


def build_sampling_unet(config: Config, device: torch.device) -> torch.nn.Module:
    """The UNet that draws pictures, wherever it was trained: without FP8, on the kernels that can
    be had here."""
    return build_unet(
        replace(config, precision=PrecisionConfig(), kernels=KernelsConfig()), 0, device
    ).eval()


def build_text_encoder(config: Config, device: torch.device) -> torch.nn.Module:
    """The frozen text tower. Raises ConfigError where its states are not what the UNet takes."""
    from sd_perf.models.text_encoder import OpenClipTextEncoder  # open_clip takes seconds to import

    encoder = OpenClipTextEncoder(config.text_encoder).to(device)
    right = f"{encoder.width}, the width of {config.text_encoder.model}'s states"
    config.model.require(encoder.width == config.model.context_dim, "context_dim", right)
    return encoder
