"""Networks read from whatever a user points at: a run, a checkpoint, a foreign file, an
autoencoder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from sd_perf.config import UNetConfig
from sd_perf.errors import CheckpointError
from sd_perf.models.onnx_autoencoder import OnnxDecoder, OnnxEncoder
from sd_perf.models.vae import AutoencoderConfig, AutoencoderKL
from sd_perf.models.weight_files import (
    load_into,
    read_diffusers_unet,
    read_ldm_checkpoint,
    require_fit,
    safetensors_config,
    split_components,
)
from sd_perf.reference.unet import UNet
from sd_perf.runs.checkpoints import CheckpointStore, load_component
from sd_perf.runs.folder import read_run_config


def read_unet(source: Path) -> tuple[dict[str, torch.Tensor], UNetConfig]:
    """UNet weights in LDM names and their config.

    `source` is a run folder (its newest checkpoint), one of its checkpoints, a folder exported for
    diffusers, or a .ckpt or .safetensors file in LDM names, which is taken to be the benchmark's
    UNet. CheckpointError where the weights are not those of the config.
    """
    if source.suffix in (".ckpt", ".safetensors"):
        state, config = split_components(read_ldm_checkpoint(source))["unet"], UNetConfig()
        if not state:
            raise CheckpointError(
                f"{source}: holds no UNet (no model.diffusion_model.* keys); give another file"
            )
    elif (source / "unet" / "config.json").is_file() or (source / "config.json").is_file():
        state, config = read_diffusers_unet(source)
    else:
        source, run = newest_checkpoint(source)
        state, config = load_component(source, "model"), read_run_config(run).model
    with torch.device("meta"):
        unet = UNet(config)
    require_fit(unet, state, "the UNet", source)
    return state, config


def newest_checkpoint(source: Path) -> tuple[Path, Path]:
    """The checkpoint that a run folder or a checkpoint folder stands for, and its run folder."""
    if (source / "state.json").is_file():
        return source, source.parent.parent
    if not source.exists():
        raise CheckpointError(f"{source}: no such run, checkpoint or weight file; check the path")
    newest = CheckpointStore(source / "checkpoints").newest()
    if newest is None:
        raise CheckpointError(
            f"{source}: holds no complete checkpoint; give a run folder or one of its checkpoints"
        )
    return newest, source


def read_autoencoder(path: Path) -> AutoencoderKL:
    """An autoencoder, frozen: Stable Diffusion's from a .ckpt or .safetensors file in LDM names, or
    one of other sizes from a .safetensors file that holds nothing else and whose metadata carries
    an AutoencoderConfig as JSON.
    """
    state = read_ldm_checkpoint(path)
    config = safetensors_config(path, AutoencoderConfig) if path.suffix == ".safetensors" else None
    if config is None:
        state = split_components(state)["vae"]
    if not state:
        raise CheckpointError(f"{path}: holds no autoencoder (no first_stage_model.* keys)")
    autoencoder = AutoencoderKL(config)
    load_into(autoencoder, state, "the autoencoder", path)
    return autoencoder.requires_grad_(False).eval()


def read_encoder(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """Images (B, 3, H, W) to moments (B, 8, H/8, W/8), from an .onnx encoder or an LDM file."""
    return (
        OnnxEncoder(path)
        if path.suffix == ".onnx"
        else torch.no_grad()(read_autoencoder(path).encode)
    )


def read_decoder(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """Unscaled latents (B, 4, H/8, W/8) to images (B, 3, H, W) in [-1, 1], from an .onnx decoder or
    an LDM file."""
    return (
        OnnxDecoder(path)
        if path.suffix == ".onnx"
        else torch.no_grad()(read_autoencoder(path).decode)
    )
