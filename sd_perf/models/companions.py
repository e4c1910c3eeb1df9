"""The frozen networks beside a UNet: what a whole pipeline has besides."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from sd_perf.config import TextEncoderConfig, UNetConfig
from sd_perf.errors import CheckpointError, UserError
from sd_perf.models.diffusers_folder import is_diffusers_folder
from sd_perf.models.readers import is_weight_file, newest_checkpoint, read_autoencoder
from sd_perf.models.text_encoder import OpenClipTextEncoder
from sd_perf.models.vae import AutoencoderKL
from sd_perf.models.weight_files import read_ldm_checkpoint, split_components
from sd_perf.models.written_weights import in_dtype
from sd_perf.runs.folder import read_run_config

M = TypeVar("M", bound=torch.nn.Module)


@dataclass(frozen=True)
class Named:
    """Where the frozen networks are to be found: files, "" where none is named."""

    autoencoder: str = ""
    text_model: str = TextEncoderConfig.model
    text_weights: str = ""


@dataclass(frozen=True)
class Companions:
    """An autoencoder and a text encoder that fit a UNet, as far as they are at hand."""

    autoencoder: AutoencoderKL | None = None
    text: OpenClipTextEncoder | None = None
    missing: tuple[str, ...] = ()
    """what is not at hand, and why, in words"""

    def by_component(self) -> dict[str, torch.nn.Module]:
        """Those that are there by their component of an LDM file, with LDM's names."""
        networks = {"vae": self.autoencoder, "text": self.text and self.text.tower}
        return {name: network for name, network in networks.items() if network is not None}

    def to_dtype(self, dtype: str) -> None:
        """Change their number format; CheckpointError as `in_dtype` raises it."""
        for what, network in {"autoencoder": self.autoencoder, "text encoder": self.text}.items():
            if network is not None:
                in_dtype(network.state_dict(), dtype, f"the {what}")
                network.to(getattr(torch, dtype))


def named_by(source: Path) -> Named:
    """The frozen networks that a source of a UNet names or holds: a run's config, or an LDM file.

    `source` is as for `readers.read_unet`.
    """
    if is_weight_file(source):
        parts = split_components(read_ldm_checkpoint(source))
        held = {part: str(source) if parts[part] else "" for part in ("vae", "text")}
        return Named(autoencoder=held["vae"], text_weights=held["text"])
    if is_diffusers_folder(source):
        return Named()
    config = read_run_config(newest_checkpoint(source)[1])
    return Named(
        config.evaluation.autoencoder or config.data.autoencoder,
        config.text_encoder.model,
        config.text_encoder.weights,
    )


def find_companions(named: Named, model: UNetConfig, required: Collection[str] = ()) -> Companions:
    """The frozen networks that are named, for a UNet of this config.

    One that cannot be used is missing, with the sentence that says why; UserError where `required`
    has the name of its field of `Named`.
    """
    missing = []

    def at_hand(what: str, field: str, read: Callable[[], M]) -> M | None:
        if not getattr(named, field):
            option = field.replace("_", "-")
            missing.append(f"the {what}: none is named; give --{option} FILE")
            return None
        try:
            return read()
        except UserError as error:
            if field in required:
                raise
            missing.append(f"the {what}: {error}")
            return None

    file = Path(named.autoencoder)
    text_config = TextEncoderConfig(named.text_model, named.text_weights)
    return Companions(
        autoencoder=at_hand("autoencoder", "autoencoder", lambda: _autoencoder(file, model)),
        text=at_hand("text encoder", "text_weights", lambda: _text_encoder(text_config, model)),
        missing=tuple(missing),
    )


def _autoencoder(path: Path, model: UNetConfig) -> AutoencoderKL:
    if path.suffix == ".onnx":
        raise CheckpointError(f"{path}: is an ONNX file, whose weights other tools cannot take")
    autoencoder = read_autoencoder(path)
    channels = autoencoder.config.latent_channels
    if channels != model.in_channels:
        raise CheckpointError(
            f"{path}: its latents have {channels} channels, and those of the UNet "
            f"{model.in_channels}; name the autoencoder that it was trained with"
        )
    return autoencoder


def _text_encoder(config: TextEncoderConfig, model: UNetConfig) -> OpenClipTextEncoder:
    encoder = OpenClipTextEncoder(config)
    if encoder.width != model.context_dim:
        raise CheckpointError(
            f"{config.weights}: its text states have {encoder.width} channels, and those of the "
            f"UNet {model.context_dim}; name the text encoder that it was trained with"
        )
    return encoder
