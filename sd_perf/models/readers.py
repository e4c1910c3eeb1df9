"""Reads networks from whatever a user names: a run, a checkpoint, a weight file, an ONNX file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sd_perf.config import DiffusionConfig, UNetConfig
from sd_perf.errors import CheckpointError, ConfigError
from sd_perf.models.diffusers_folder import is_diffusers_folder, read_diffusers_unet, read_scheduler
from sd_perf.models.key_maps import PREDICTION_TYPES, from_diffusers
from sd_perf.models.merged_upsampling import merge_upsampling
from sd_perf.models.onnx_autoencoder import OnnxDecoder, OnnxEncoder
from sd_perf.models.vae import AutoencoderConfig, AutoencoderKL
from sd_perf.models.weight_files import (
    AUTOENCODER_CONFIG,
    DIFFUSION_CONFIG,
    EMA_PREFIX,
    PREDICTION,
    UNET_CONFIG,
    averaged_unet,
    filled,
    read_ldm_checkpoint,
    require_fit,
    safetensors_config,
    safetensors_metadata,
    split_components,
)
from sd_perf.reference.unet import UNet
from sd_perf.runs.checkpoint_files import STATE_NAME, read_state, run_folder_of
from sd_perf.runs.checkpoints import CheckpointStore, load_weights
from sd_perf.runs.folder import read_run_config, require_of_run

_NO_EMA = "take the weights themselves (without --ema; as model.init, with model.init_ema false)"
PICKLES = (".ckpt", ".bin", ".pt", ".pth")
"""suffixes of weight files that `torch.save` writes"""


def read_unet(
    source: Path, groups: int | None = None, ema: bool = False
) -> tuple[dict[str, torch.Tensor], UNetConfig]:
    """UNet weights, under LDM's names, and their config.

    `source` is one of: a run folder, whose newest checkpoint is read; a checkpoint folder; a folder
    exported for diffusers; a weight file with LDM's names. A file without a config of its own must
    hold Stable Diffusion v2's UNet, of which `groups` says the GroupNorm groups in ResBlocks and
    head: 16 in the benchmark's, 32 in the published one. With `ema` the averaged weights are read
    that `source` holds beside the others.

    Raises CheckpointError where the weights do not fit the config, where a file cannot tell its
    groups and `groups` does not, and where `groups` says otherwise than `source`.
    """
    state, config = find_unet(source, ema)
    if config is None:
        if groups is None:
            raise CheckpointError(
                f"{source}: does not tell the GroupNorm groups of its ResBlocks; add --groups 32 "
                "for a published Stable Diffusion v2, --groups 16 for the benchmark's network"
            )
        config = UNetConfig(resblock_groups=groups)
    if groups not in (None, config.resblock_groups):
        raise CheckpointError(
            f"--groups: {groups} cannot be used, since {source} says {config.resblock_groups}; "
            "leave it out"
        )
    with torch.device("meta"):  # names and shapes only, no memory
        unet = UNet(config)
    require_fit(unet, state, "the UNet", source)
    return state, config


def find_unet(source: Path, ema: bool) -> tuple[dict[str, torch.Tensor], UNetConfig | None]:
    """Weights as `read_unet` has them, and the config that `source` tells; None where it does not.

    They are not compared with one another.
    """
    if is_weight_file(source):
        return _read_unet_file(source, ema)
    if is_diffusers_folder(source):
        averaged = source / "unet_ema"
        if ema and not is_diffusers_folder(averaged):
            raise CheckpointError(f"{averaged}: no such folder of a UNet; {_NO_EMA}")
        return read_diffusers_unet(averaged if ema else source)
    source, run = newest_checkpoint(source)
    require_of_run(source, read_state(source), run)
    return load_weights(source, ema), read_run_config(run).model


def is_weight_file(source: Path) -> bool:
    """Whether a path is named as a weight file is."""
    return source.suffix in (".safetensors", *PICKLES)


def _read_unet_file(path: Path, ema: bool) -> tuple[dict[str, torch.Tensor], UNetConfig | None]:
    """The UNet in a weight file with LDM's names, and its config where the file has that."""
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
    averaged = averaged_unet(weights) if ema else {}
    if ema and not averaged:
        raise CheckpointError(f"{path}: holds no averaged weights ({EMA_PREFIX}*); {_NO_EMA}")
    return averaged or parts["unet"], config


def read_diffusion(source: Path) -> DiffusionConfig:
    """The noise schedule and target of `source`, as for `read_unet`; the benchmark's where untold.

    Raises CheckpointError where `source` tells one that cannot be used.
    """
    try:
        return DiffusionConfig(**told_diffusion(source))
    except ConfigError as error:
        raise CheckpointError(f"{source}: its scheduler cannot be used ({error})") from error


def told_diffusion(source: Path) -> dict[str, Any]:
    """Fields of DiffusionConfig that `source`, as for `read_unet`, tells.

    A run tells all, and so does a .safetensors file that was exported from one. The scheduler of a
    diffusers folder tells all but latent_scale, another .safetensors file the prediction where its
    metadata has it, and any other file nothing.
    """
    if source.suffix == ".safetensors":
        if config := safetensors_config(source, DiffusionConfig, DIFFUSION_CONFIG):
            return dict(vars(config))
        told = safetensors_metadata(source).get(PREDICTION)
        return {"prediction": told} if told in PREDICTION_TYPES else {}
    if is_weight_file(source):
        return {}
    if is_diffusers_folder(source):
        return read_scheduler(source)
    return dict(vars(read_run_config(newest_checkpoint(source)[1]).diffusion))


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
    or alone in diffusers' names. One of other sizes is a .safetensors file with an
    AutoencoderConfig as JSON in its metadata. Raises CheckpointError for a file without
    one.
    """
    state = read_ldm_checkpoint(path)
    config = None
    if path.suffix == ".safetensors":
        config = safetensors_config(path, AutoencoderConfig, AUTOENCODER_CONFIG)
    if "encoder.conv_norm_out.weight" in state:
        state = from_diffusers(state, config or AutoencoderConfig())
    else:
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
    [-1, 1]. It computes on the device, channels-last, in `dtype`, on a CPU with merged upsampling;
    an .onnx file is run on the CPU, in its own.
    """
    if path.suffix == ".onnx":
        onnx = OnnxDecoder(path)
        return lambda latents: onnx(latents.cpu())
    layout = torch.channels_last
    autoencoder = read_autoencoder(path).to(device, dtype, memory_format=layout)  # type: ignore[call-overload]
    if torch.device(device).type == "cpu":
        merge_upsampling(autoencoder)

    @torch.no_grad()
    def decode(latents: torch.Tensor) -> torch.Tensor:
        z = latents.to(device, dtype).contiguous(memory_format=layout)
        return autoencoder.decode(z).float().contiguous()

    return decode
