"""Whole pipelines of diffusers: a UNet with its scheduler, and the frozen networks beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from sd_perf.config import DiffusionConfig, UNetConfig
from sd_perf.models.companions import Companions
from sd_perf.models.diffusers_folder import (
    LOAD_UNET,
    export_diffusers,
    needs_loader,
    write_entries,
    write_model,
)
from sd_perf.models.key_maps import diffusers_autoencoder_config, to_diffusers
from sd_perf.models.transformers_text import text_config, text_weights, write_tokenizer
from sd_perf.models.weight_files import AUTOENCODER_CONFIG
from sd_perf.models.written_weights import new_path

UNET_CLASS = "MixedGroupsUNet"
"""the class of load_unet.py"""


def pipeline_index(model: UNetConfig) -> dict[str, Any]:
    """The content of `model_index.json`: a `StableDiffusionPipeline` without a safety checker.

    A UNet that stock diffusers would compute wrongly is named as the class in the loader beside it.
    """
    unet = [LOAD_UNET.stem, UNET_CLASS] if needs_loader(model) else _in("UNet2DConditionModel")
    return {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": _in("DDIMScheduler"),
        "text_encoder": _in("CLIPTextModel", "transformers"),
        "tokenizer": _in("CLIPTokenizer", "transformers"),
        "unet": unet,
        "vae": _in("AutoencoderKL"),
    }


def _in(name: str, library: str = "diffusers") -> list[str]:
    return [library, name]


def export_pipeline(
    unet_state: Mapping[str, Tensor],
    companions: Companions,
    folder: Path,
    model: UNetConfig,
    diffusion: DiffusionConfig,
    latent_size: int,
    card: str,
) -> None:
    """Write what `StableDiffusionPipeline.from_pretrained` opens, and its README.md.

    Where companions are missing, it is what `export_diffusers` writes, and the README.md. `model`
    and `diffusion` are the UNet's; latent_size is the side of the latents that the pipeline draws
    by default. Each network keeps its dtype. Raises CheckpointError where one of the files exists
    or cannot be written, and for a network that diffusers or transformers cannot express.
    """
    autoencoder, text = companions.autoencoder, companions.text
    with ExitStack() as files:

        def draft(name: str) -> Path:
            return files.enter_context(new_path(folder / name))

        if not companions.missing:
            # Drafts take their names in reverse order: a folder that has an index is whole.
            write_entries(draft("model_index.json"), pipeline_index(model))
        draft("README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
        if autoencoder is not None:
            config, scale = autoencoder.config, diffusion.latent_scale
            entries = diffusers_autoencoder_config(config, scale, latent_size)
            weights = to_diffusers(autoencoder.state_dict(), config)
            told = {AUTOENCODER_CONFIG: json.dumps(vars(config))}
            write_model(draft("vae"), entries, weights, metadata=told)
        if text is not None:
            write_model(draft("text_encoder"), text_config(text), text_weights(text), name="model")
            write_tokenizer(text, draft("tokenizer"))
        export_diffusers(unet_state, model, folder, latent_size, diffusion)
