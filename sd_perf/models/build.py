"""The networks of a config, on their device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from sd_kernels.spec import Target
from sd_perf.config import Config, KernelsConfig, PrecisionConfig
from sd_perf.fast.choice import choose_kernels
from sd_perf.fast.ops import Ops
from sd_perf.fast.unet import FastUNet
from sd_perf.models.vae import PIXELS_PER_LATENT
from sd_perf.reference.unet import UNet

TextEncoder = Callable[[list[str]], torch.Tensor]
"""B captions -> text states (B, T, D)"""
ImageEncoder = Callable[[torch.Tensor], torch.Tensor]
"""pixels (B, 3, 8S, 8S) float32 on its device -> unscaled moments (B, 2C, S, S)"""


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

    It computes without FP8, in evaluation.precision, on the kernels that this machine has.
    """
    precision = config.evaluation.precision
    training = replace(config.training, precision=precision)  # what kernels are chosen by
    here = replace(config, training=training, precision=PrecisionConfig(), kernels=KernelsConfig())
    # On a CPU the plain network is the faster one: its matmuls and convolutions add their biases.
    ops = None if device.type == "cpu" else choose_ops(here)
    unet = build_unet(here, seed=0, device=device, ops=ops).eval()
    return unet.to(DTYPES[precision])


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""by evaluation.precision"""


def build_encoders(
    config: Config, device: torch.device
) -> tuple[TextEncoder | None, ImageEncoder | None]:
    """The frozen text and image encoders that a training step needs; None for what it does not."""
    text = build_text_encoder(config, device) if config.encodes_text else None
    return text, build_image_encoder(config, device) if config.data.format == "raw" else None


def build_image_encoder(config: Config, device: torch.device) -> ImageEncoder:
    """The frozen encoder of data.autoencoder; ConfigError where the UNet takes other latents."""
    # Files of weights need safetensors, which building a UNet does not.
    from sd_perf.models.readers import read_autoencoder, read_encoder

    path = Path(config.data.autoencoder)
    if path.suffix == ".onnx":
        right = "a .ckpt or .safetensors file: .onnx files are run on the CPU, and this is a GPU"
        config.data.require(device.type == "cpu", "autoencoder", right)
        config.model.require(config.model.in_channels == 4, "in_channels", "4 for an .onnx encoder")
        return read_encoder(path)
    autoencoder = read_autoencoder(path)
    latent_channels, factor = autoencoder.config.latent_channels, autoencoder.config.downsampling
    right = f"{latent_channels}, the channels of {path}'s latents"
    config.model.require(latent_channels == config.model.in_channels, "in_channels", right)
    right = f"an autoencoder of factor {PIXELS_PER_LATENT}; this one has factor {factor}"
    config.data.require(factor == PIXELS_PER_LATENT, "autoencoder", right)
    encoder = torch.nn.Sequential(autoencoder.encoder, autoencoder.quant_conv).to(device)
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    encoder = encoder.to(memory_format=layout)  # type: ignore[call-overload]

    @torch.no_grad()
    def encode(pixels: torch.Tensor) -> torch.Tensor:
        return encoder(pixels.contiguous(memory_format=layout))

    return encode


def build_text_encoder(config: Config, device: torch.device) -> torch.nn.Module:
    """The frozen text tower. Raises ConfigError where its states are not what the UNet takes."""
    from sd_perf.models.text_encoder import OpenClipTextEncoder  # open_clip takes seconds to import

    encoder = OpenClipTextEncoder(config.text_encoder).to(device)
    right = f"{encoder.width}, the width of {config.text_encoder.model}'s states"
    config.model.require(encoder.width == config.model.context_dim, "context_dim", right)
    return encoder
