"""Weights written for other tools: safetensors files, LDM names, number formats.

Writing never replaces a file, and leaves either a complete file or none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sd_perf.config import FIRST_WEIGHTS, DiffusionConfig, UNetConfig
from sd_perf.errors import CheckpointError
from sd_perf.files import disk_errors, written_aside
from sd_perf.models.weight_files import (
    AUTOENCODER_CONFIG,
    DIFFUSION_CONFIG,
    PREDICTION,
    PREFIXES,
    UNET_CONFIG,
    reason,
    safetensors_package,
)


def export_ldm(
    unet_state: Mapping[str, Tensor],
    path: str | Path,
    metadata: Mapping[str, str],
    config: UNetConfig | None = None,
    diffusion: DiffusionConfig | None = None,
    others: Mapping[str, Any] | None = None,
) -> None:
    """Write the UNet's weights as safetensors under the names of an LDM checkpoint.

    `metadata` is text to store in the file. The config is stored there, too, since shapes do not
    tell the groups of GroupNorms, and so is `diffusion`. `others` are networks to put in the file
    besides, with LDM's names, by component (`PREFIXES`); the autoencoder's config is stored with
    it. Raises CheckpointError where `path` exists or cannot be written.
    """
    if config is not None:
        network = {key: it for key, it in vars(config.network).items() if key not in FIRST_WEIGHTS}
        metadata = {**metadata, UNET_CONFIG: json.dumps(network)}
    if diffusion is not None:
        told = {PREDICTION: diffusion.prediction, DIFFUSION_CONFIG: json.dumps(vars(diffusion))}
        metadata = {**metadata, **told}
    states = {"unet": unet_state}
    for component, other in (others or {}).items():
        states[component] = other.state_dict()
        if component == "vae":
            metadata = {**metadata, AUTOENCODER_CONFIG: json.dumps(vars(other.config))}
    tensors = {
        PREFIXES[component] + name: value
        for component, state in states.items()
        for name, value in state.items()
    }
    with new_path(Path(path)) as draft:
        save_safetensors(tensors, draft, metadata)


def in_dtype(state: Mapping[str, Tensor], dtype: str, source: object) -> dict[str, Tensor]:
    """The weights in the number format of this name, such as float16.

    Raises CheckpointError where a finite weight is beyond its largest number.
    """
    cast = {name: value.to(getattr(torch, dtype)) for name, value in state.items()}
    for name, value in cast.items():
        if (value.isinf() & state[name].isfinite()).any():
            raise CheckpointError(
                f"{source}: {name} has values beyond the range of {dtype}; give another --dtype"
            )
    return cast


def dtypes_of(state: Mapping[str, Tensor]) -> str:
    """The number formats of weights in words, such as "float16 and float32"."""
    names = sorted({str(value.dtype).removeprefix("torch.") for value in state.values()})
    return " and ".join(names)


@contextmanager
def new_path(target: Path) -> Iterator[Path]:
    """`written_aside` for a path that must not exist; errors of the disk become CheckpointError."""
    if target.exists():
        raise CheckpointError(
            f"{target}: exists already; nothing is overwritten, so give another path or move it "
            "away"
        )
    with disk_errors(target, "make room, or choose another path", CheckpointError):
        target.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(target) as draft:
            yield draft


def save_safetensors(
    tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]
) -> None:
    """Write tensors from any device and of any layout; OSError where the library refuses.

    The file has the permissions of any new file; the library alone would make it private.
    """
    safetensors = safetensors_package()
    path.touch()
    mode = path.stat().st_mode
    packed = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    try:
        # Hugging Face's loaders require the entry "format".
        safetensors.torch.save_file(packed, path, {"format": "pt", **metadata})
        path.chmod(mode)
    except safetensors.SafetensorError as error:
        raise OSError(reason(error)) from error
