"""Folders of diffusers: reads a UNet, writes a UNet with its scheduler."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sd_perf.config import DiffusionConfig, UNetConfig
from sd_perf.errors import CheckpointError, ConfigError
from sd_perf.files import is_storable, misfit, parse_json, quoted, read_untrusted
from sd_perf.models.key_maps import (
    PREDICTION_TYPES,
    diffusers_unet_config,
    from_diffusers,
    scheduler_config,
    to_diffusers,
)
from sd_perf.models.weight_files import read_ldm_checkpoint, reason
from sd_perf.models.written_weights import new_path, save_safetensors

LOAD_UNET = Path(__file__).with_name("load_unet.py")
"""the loader that `export_diffusers` copies into its folder; nothing here imports it"""
NEEDS_LOADER = "norms of two numbers of groups: load this folder with its load_unet.py"
"""the type of middle block of a network that stock diffusers would compute wrongly: it does not
know this type, and stops with an error that names it"""
WEIGHTS = "diffusion_pytorch_model"
"""file name of a diffusers model's weights, without suffix"""


SCHEDULER = {
    "num_train_timesteps": "num_timesteps",
    "beta_start": "beta_start",
    "beta_end": "beta_end",
}
"""fields of a diffusers scheduler's config: those of DiffusionConfig that say the same"""


_UNET = {
    **dict.fromkeys(("in_channels", "out_channels", "layers_per_block", "norm_num_groups"), int),
    **{"cross_attention_dim": int, "transformer_norm_num_groups?": int},
    **{"block_out_channels": [int], "attention_head_dim": [int], "down_block_types": [str]},
}
"""shape of a UNet's config, see `sd_perf.files.misfit`"""


def is_diffusers_folder(path: Path) -> bool:
    """Whether a folder is a pipeline of diffusers, or a UNet of one."""
    return any((path / name).is_file() for name in ("config.json", "unet/config.json"))


def read_diffusers_unet(folder: str | Path) -> tuple[dict[str, Tensor], UNetConfig]:
    """Weights, under LDM's names, and config of a diffusers UNet.

    The folder holds `config.json` or `unet/config.json`, and beside it weights as safetensors or
    .bin, whole or in shards; the full-precision ones are read where there are several. Raises
    CheckpointError where it does not, and for a network that `UNetConfig` cannot express.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        folder = folder / "unet"
    config = _unet_config(_read_config(path := folder / "config.json"), path)
    return from_diffusers(_read_weights(folder), config), config


def read_scheduler(folder: Path) -> dict[str, Any]:
    """Fields of DiffusionConfig that the scheduler of a diffusers pipeline tells; empty without it.

    `folder` is the pipeline's or that of its UNet. Raises CheckpointError for a scheduler of
    another noise schedule than `make_alphas_cumprod`, or of a prediction that is no v or epsilon.
    """
    found = (root / "scheduler" / "scheduler_config.json" for root in (folder, folder.parent))
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        return {}
    entries, numbers = _read_config(path), dict.fromkeys(SCHEDULER, (int, float))
    texts = {"prediction_type?": str, "beta_schedule?": str}
    fault = misfit(entries, {**{f"{name}?": kinds for name, kinds in numbers.items()}, **texts})
    # diffusers leaves out what is its default.
    predicted = entries.get("prediction_type", "epsilon")
    ours = {theirs: ours for ours, theirs in PREDICTION_TYPES.items()}
    if not fault and (betas := entries.get("beta_schedule", "linear")) != "scaled_linear":
        fault = f"beta_schedule is {betas!r}, and this trainer has 'scaled_linear'"
    if not fault and predicted not in ours:
        fault = f"prediction_type is {predicted!r}, and this trainer has {' and '.join(ours)}"
    if fault:
        raise CheckpointError(f"{path}: cannot be used ({fault}); take other weights")
    told = {mine: entries[theirs] for theirs, mine in SCHEDULER.items() if theirs in entries}
    rescaled = entries.get("rescale_betas_zero_snr") is True
    return {**told, "prediction": ours[predicted], "zero_terminal_snr": rescaled}


def _read_config(path: Path) -> dict[str, Any]:
    """The entries of a config of diffusers; CheckpointError where there are none."""
    try:
        entries = parse_json(read_untrusted(path, kind=CheckpointError))
        if fault := misfit(entries, {}):
            raise ValueError(fault)
    except ValueError as error:
        raise CheckpointError(
            f"{path}: cannot be read as a diffusers config ({reason(error)})"
        ) from error
    return entries


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a diffusers model, under diffusers' names."""
    for suffix in (".safetensors", ".bin"):
        if (folder / f"{WEIGHTS}{suffix}").is_file():
            return read_ldm_checkpoint(folder / f"{WEIGHTS}{suffix}")
        if (folder / f"{WEIGHTS}{suffix}.index.json").is_file():
            return _read_parts(folder / f"{WEIGHTS}{suffix}.index.json")
    found = {
        path.name: path
        for suffix in (".safetensors", ".bin")
        for path in sorted(folder.glob(f"{WEIGHTS}.*{suffix}"))
        if path.name.count(".") == 2 and "-of-" not in path.name
    }
    if len(found) != 1:
        names = f"several variants ({', '.join(found)})" if found else "no weights"
        raise CheckpointError(
            f"{folder}: holds {names}; put one file there as {WEIGHTS}.safetensors"
        )
    return read_ldm_checkpoint(*found.values())


def _read_parts(index: Path) -> dict[str, Tensor]:
    """The weights of all parts that an index names, each beside it."""
    try:
        weight_map = parse_json(read_untrusted(index, kind=CheckpointError))["weight_map"]
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if Path(name).name != name or not name]
        outside += [name for name in names if not is_storable(name)]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index}: cannot be read as the index of weights in parts ({reason(error)})"
        ) from error
    if outside:
        raise CheckpointError(f"{index}: names {quoted(outside[0])}, which is no file beside it")
    weights: dict[str, Tensor] = {}
    for name in names:
        weights |= read_ldm_checkpoint(index.with_name(name))
    if weights.keys() != weight_map.keys():
        odd = sorted(weights.keys() ^ weight_map.keys())
        raise CheckpointError(
            f"{index}: its parts hold other weights than it names (the first is {odd[0]}); fetch "
            "all of them again"
        )
    return weights


def _unet_config(entries: dict[str, Any], path: Path) -> UNetConfig:
    """The inverse of `diffusers_unet_config`; CheckpointError where there is no such config."""
    try:
        if fault := misfit(entries, _UNET):
            raise TypeError(fault)
        widths, heads = entries["block_out_channels"], entries["attention_head_dim"]
        kinds = entries["down_block_types"]
        config = UNetConfig(
            in_channels=entries["in_channels"],
            out_channels=entries["out_channels"],
            model_channels=widths[0],
            channel_mult=tuple(width // widths[0] for width in widths),
            num_res_blocks=entries["layers_per_block"],
            attention_resolutions=tuple(
                2**n for n in reversed(range(len(kinds))) if kinds[n] != "DownBlock2D"
            ),
            num_head_channels=widths[0] // heads[0],
            context_dim=entries["cross_attention_dim"],
            resblock_groups=entries["norm_num_groups"],
            transformer_groups=entries.get(
                "transformer_norm_num_groups", entries["norm_num_groups"]
            ),
        )
    except (LookupError, TypeError, ArithmeticError, ConfigError) as error:
        raise CheckpointError(
            f"{path}: describes no UNet of this trainer ({type(error).__name__}: {reason(error)})"
        ) from error
    # Entries that the config does not hold, such as the activation, must be what ours would write.
    for key, value in diffusers_unet_config(config, entries.get("sample_size", 64)).items():
        if entries.get(key, value) not in (value, NEEDS_LOADER):
            raise CheckpointError(
                f"{path}: {key} is {entries[key]!r}, and this trainer's UNet has {value!r}"
            )
    return config


def export_diffusers(
    unet_state: Mapping[str, Tensor],
    config: UNetConfig,
    folder: str | Path,
    sample_size: int = 64,
    diffusion: DiffusionConfig | None = None,
) -> None:
    """Write `unet/` (config.json, weights as safetensors) and `scheduler/` into a folder.

    Where ResBlocks and transformers have the same number of GroupNorm groups,
    `UNet2DConditionModel.from_pretrained` loads the result. The benchmark's differ. Then stock
    diffusers refuses it, and `unet/load_unet.py` is added, which loads it; its docstring says why.

    sample_size is the side of the latents that pipelines draw by default; `diffusion` (default: the
    benchmark's) is the noise schedule. Raises CheckpointError where `unet` or `scheduler` exists or
    cannot be written.
    """
    folder = Path(folder)
    with new_path(folder / "unet") as unet, new_path(folder / "scheduler") as scheduler:
        entries = diffusers_unet_config(config, sample_size)
        if needs_loader(config):
            entries["mid_block_type"] = NEEDS_LOADER
        write_model(unet, entries, to_diffusers(unet_state, config))
        if needs_loader(config):
            shutil.copyfile(LOAD_UNET, unet / LOAD_UNET.name)
        scheduler.mkdir()
        schedule = scheduler_config(diffusion or DiffusionConfig())
        write_entries(scheduler / "scheduler_config.json", schedule)


def needs_loader(config: UNetConfig) -> bool:
    """Whether diffusers loads this network with `load_unet.py` alone."""
    return config.resblock_groups != config.transformer_groups


def write_model(
    folder: Path,
    entries: dict[str, Any],
    weights: Mapping[str, Tensor],
    name: str = WEIGHTS,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Make a folder of a model: `config.json` with these entries, and its weights."""
    folder.mkdir()
    write_entries(folder / "config.json", entries)
    save_safetensors(weights, folder / f"{name}.safetensors", metadata or {})


def write_entries(path: Path, entries: dict[str, Any]) -> None:
    """Write a config of diffusers or transformers."""
    path.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
