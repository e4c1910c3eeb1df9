"""Reads networks from whatever a user names: a run, a checkpoint, a weight file, an ONNX file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from sd_perf.config import DiffusionConfig, UNetConfig
from sd_perf.errors import CheckpointError
from sd_perf.models.diffusers_folder import read_diffusers_unet
from sd_perf.models.key_maps import from_diffusers
from sd_perf.models.onnx_autoencoder import OnnxDecoder, OnnxEncoder
from sd_perf.models.vae import AutoencoderConfig, AutoencoderKL
from sd_perf.models.weight_files import (
    UNET_CONFIG,
    filled,
    read_ldm_checkpoint,
    require_fit,
    safetensors_config,
    split_components,
)
from sd_perf.reference.unet import UNet
from sd_perf.runs.checkpoint_files import STATE_NAME, read_state, run_folder_of
from sd_perf.runs.checkpoints import CheckpointStore, load_component
from sd_perf.runs.folder import read_run_config, require_of_run

PICKLES = (".ckpt", ".bin", ".pt", ".pth")
"""suffixes of weight files that `torch.save` writes"""


def read_unet(
    source: Path, groups: int | None = None
) -> tuple[dict[str, torch.Tensor], UNetConfig]:
    """UNet weights, under LDM's names, and their config.

    `source` is one of: a run folder, whose newest checkpoint is read; a checkpoint folder; a folder
    exported for diffusers; a weight file with LDM's names. A file without a config of its own must
    hold Stable Diffusion v2's UNet, of which `groups` says the GroupNorm groups in ResBlocks and
    head: 16 in the benchmark's, 32 in the published one.

    Raises CheckpointError where the weights do not fit the config, where a file cannot tell its
    groups and `groups` does not, and where `groups` says otherwise than `source`.
    """
    if source.suffix in (".safetensors", *PICKLES):
        state, config = _read_unet_file(source, groups)
    elif (source / "unet" / "config.json").is_file() or (source / "config.json").is_file():
        state, config = read_diffusers_unet(source)
    else:
        source, run = newest_checkpoint(source)
        config = read_run_config(run).model
        require_of_run(source, read_state(source), run)
        state = load_component(source, "model")
    if groups not in (None, config.resblock_groups):
        raise CheckpointError(
            f"--groups: {groups} cannot be used, since {source} says {config.resblock_groups}; "
            "leave it out"
        )
    with torch.device("meta"):  # names and shapes only, no memory
        unet = UNet(config)
    require_fit(unet, state, "the UNet", source)
    return state, config


def _read_unet_file(path: Path, groups: int | None) -> tuple[dict[str, torch.Tensor], UNetConfig]:
    """The UNet in a weight file with LDM's names, and its config."""
    parts = split_components(weights := read_ldm_checkpoint(path))
    if not parts["unet"]:
        held = next((f"the {part}" for part in ("vae", "text") if parts[part]), "other weights")
        if "conv_in.weight" in weights:
            held = "a model of diffusers, whose folder with its config.json is needed"
        raise CheckpointError(
            f"{path}: holds no UNet (no model.diffusion_model.* keys) but {held}; give another file"
        )
    config = None
    if path.suffix == ".safetensors":
        config = safetensors_config(path, UNetConfig, UNET_CONFIG)
    if config is not None:
        return parts["unet"], config
    if groups is None:
        raise CheckpointError(
            f"{path}: does not tell the GroupNorm groups of its ResBlocks; add --groups 32 for a "
            "published Stable Diffusion v2, --groups 16 for the benchmark's network"
        )
    return parts["unet"], UNetConfig(resblock_groups=groups)


def read_diffusion(source: Path) -> DiffusionConfig:
    """The noise schedule of the run that `source`, as for `read_unet`, is of; else the benchmark's.

    Weight files and folders of diffusers are of no run.
    """
    of_run = source.is_dir() and not any(
        (source / name).is_file() for name in ("config.json", "unet/config.json")
    )
    return read_run_config(newest_checkpoint(source)[1]).diffusion if of_run else DiffusionConfig()


def newest_checkpoint(source: Path) -> tuple[Path, Path]:
    """The checkpoint folder that `source` means, and its run folder.

    `source` is a run folder, of which the newest checkpoint is meant, or a checkpoint folder.
    Raises CheckpointError where there is no checkpoint.
    """
    if (source / STATE_NAME).is_file():
        return source, run_folder_of(source)
    if not source.exists():
        raise CheckpointError(f"{source}: no such run, checkpoint or weight file; check the path")
    newest = CheckpointStore(source / "checkpoints").newest()
    if newest is None:
        raise CheckpointError(
            f"{source}: holds no complete checkpoint; give a run folder or one of its checkpoints"
        )
    return newest, source


def read_autoencoder(path: Path) -> AutoencoderKL:
    """The autoencoder in a weight file, frozen.

    The file holds Stable Diffusion's, in LDM's names, with or without the rest of the checkpoint,
    or alone in diffusers' names. An autoencoder of other sizes is a .safetensors file of its own,
    with an AutoencoderConfig as JSON in its metadata. Raises CheckpointError for a file without
    one.
    """
    state = read_ldm_checkpoint(path)
    config = safetensors_config(path, AutoencoderConfig) if path.suffix == ".safetensors" else None
    if config is None and "encoder.conv_norm_out.weight" in state:
        state = from_diffusers(state, AutoencoderConfig())
    elif config is None:
        state = split_components(state)["vae"]
    if not state:
        raise CheckpointError(
            f"{path}: holds no autoencoder (no first_stage_model.* keys, nor encoder.* and "
            "decoder.* alone)"
        )
    autoencoder = filled(lambda: AutoencoderKL(config), state, "the autoencoder", path)
    return autoencoder.requires_grad_(False).eval()


def read_encoder(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """The encoder in an .onnx file, or in a file that `read_autoencoder` takes.

    It is a function from images (B, 3, H, W) to unscaled moments (B, 8, H/8, W/8).
    """
    if path.suffix == ".onnx":
        return OnnxEncoder(path)
    return torch.no_grad()(read_autoencoder(path).encode)


def read_decoder(
    path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The decoder in an .onnx file, or in a file that `read_autoencoder` takes.

    It is a function from unscaled latents (B, 4, H/8, W/8) to images (B, 3, H, W) float32 in
    [-1, 1]. It computes on the device, channels-last, in `dtype`; an .onnx file is run on the CPU,
    in its own.
    """
    if path.suffix == ".onnx":
        onnx = OnnxDecoder(path)
        return lambda latents: onnx(latents.cpu())
    layout = torch.channels_last
    autoencoder = read_autoencoder(path).to(device, dtype, memory_format=layout)  # type: ignore[call-overload]

    @torch.no_grad()
    def decode(latents: torch.Tensor) -> torch.Tensor:
        z = latents.to(device, dtype).contiguous(memory_format=layout)
        return autoencoder.decode(z).float().contiguous()

    return decode
