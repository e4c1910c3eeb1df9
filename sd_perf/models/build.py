"""The networks of a config, on their device."""

from __future__ import annotations

from dataclasses import replace

import torch

from sd_kernels.spec import Target
from sd_perf.config import Config, KernelsConfig, PrecisionConfig
from sd_perf.fast.choice import choose_kernels
from sd_perf.fast.ops import Ops
from sd_perf.fast.unet import FastUNet
from sd_perf.reference.unet import UNet


def build_unet(config: Config, seed: int, device: torch.device, ops: Ops | None) -> torch.nn.Module:
    """The UNet with its initial weights, float32.

    Weights depend on the seed alone, not on device or implementation. `ops` are the chosen
    operators of the fast network; the plain one takes none.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet: torch.nn.Module = (
            UNet(config.model) if ops is None else FastUNet(config.model, ops, config.precision)
        )
    # NHWC is what tensor cores want. torch's annotations of Module.to lack memory_format.
    layout = {"memory_format": torch.channels_last} if device.type == "cuda" else {}
    unet = unet.to(device, **layout)  # type: ignore[call-overload]
    if config.model.compile:
        unet.compile(fullgraph=True, dynamic=False)  # in place: the names of parameters stay
    return unet


def choose_ops(config: Config, target: Target | None = None) -> Ops | None:
    """The operators of the config's network, chosen for a target (this machine); None for plain.

    For whoever runs the network outside a training run, whose kernels `training.launch` chooses.
    """
    if config.model.implementation == "plain":
        return None
    return Ops.chosen(choose_kernels(config, target or Target.here()))


def build_sampling_unet(config: Config, device: torch.device) -> torch.nn.Module:
    """The UNet that draws pictures, wherever it was trained.

    It computes without FP8 and on the kernels that this machine has.
    """
    here = replace(config, precision=PrecisionConfig(), kernels=KernelsConfig())
    return build_unet(here, seed=0, device=device, ops=choose_ops(here)).eval()


def build_text_encoder(config: Config, device: torch.device) -> torch.nn.Module:
    """The frozen text tower. Raises ConfigError where its states are not what the UNet takes."""
    from sd_perf.models.text_encoder import OpenClipTextEncoder  # open_clip takes seconds to import

    encoder = OpenClipTextEncoder(config.text_encoder).to(device)
    right = f"{encoder.width}, the width of {config.text_encoder.model}'s states"
    config.model.require(encoder.width == config.model.context_dim, "context_dim", right)
    return encoder
