"""Reads networks from whatever a user names: a run, a checkpoint, a weight file, an ONNX file."""

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
from sd_perf.runs.checkpoint_files import STATE_NAME, read_state
from sd_perf.runs.checkpoints import CheckpointStore, load_component
from sd_perf.runs.folder import read_run_config, require_of_run


def read_unet(source: Path) -> tuple[dict[str, torch.Tensor], UNetConfig]:
    """UNet weights, under LDM's names, and their config.

    `source` is one of: a run folder, whose newest checkpoint is read; a checkpoint folder; a folder
    exported for diffusers; a .ckpt or .safetensors file with LDM's names, which must hold the
    benchmark's UNet. Raises CheckpointError where the weights do not fit the config.
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
        config = read_run_config(run).model
        require_of_run(source, read_state(source), run)
        state = load_component(source, "model")
    with torch.device("meta"):  # names and shapes only, no memory
        unet = UNet(config)
    require_fit(unet, state, "the UNet", source)
    return state, config


def newest_checkpoint(source: Path) -> tuple[Path, Path]:
    """The checkpoint folder that `source` means, and its run folder.

    `source` is a run folder, of which the newest checkpoint is meant, or a checkpoint folder.
    Raises CheckpointError where there is no checkpoint.
    """
    if (source / STATE_NAME).is_file():
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
    """The autoencoder in a weight file with LDM's names, frozen.

    A .ckpt or .safetensors file holds Stable Diffusion's. An autoencoder of other sizes is a
    .safetensors file of its own, with an AutoencoderConfig as JSON in its metadata. Raises
    CheckpointError for a file without one.
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
    """The encoder in an .onnx file, or in a file that `read_autoencoder` takes.

    It is a function from images (B, 3, H, W) to unscaled moments (B, 8, H/8, W/8).
    """
    if path.suffix == ".onnx":
        return OnnxEncoder(path)
    return torch.no_grad()(read_autoencoder(path).encode)


def read_decoder(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """The decoder in an .onnx file, or in a file that `read_autoencoder` takes.

    It is a function from unscaled latents (B, 4, H/8, W/8) to images (B, 3, H, W) in [-1, 1].
    """
    if path.suffix == ".onnx":
        return OnnxDecoder(path)
    return torch.no_grad()(read_autoencoder(path).decode)
