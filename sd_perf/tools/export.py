"""`sd-perf export`: the UNet's weights, with the frozen networks beside it, for other tools."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from sd_perf.config import DataConfig, DiffusionConfig, UNetConfig
from sd_perf.errors import CheckpointError, UserError
from sd_perf.models.companions import Companions, Named, find_companions, named_by
from sd_perf.models.diffusers_folder import is_diffusers_folder
from sd_perf.models.pipeline_folder import export_pipeline
from sd_perf.models.readers import (
    is_weight_file,
    newest_checkpoint,
    read_diffusion,
    read_unet,
    told_diffusion,
)
from sd_perf.models.written_weights import dtypes_of, export_ldm, in_dtype
from sd_perf.runs.checkpoint_files import read_state
from sd_perf.runs.folder import read_run_config
from sd_perf.tools.model_card import Exported, Trained, model_card

OTHERS_GROUPS = 32
"""GroupNorm groups that tools which read LDM files take, everywhere"""


@dataclass(frozen=True)
class Wanted:
    """What to export, and how; fields as the options of `sd-perf export`."""

    source: Path
    output: Path
    format: Literal["ldm", "diffusers"] = "ldm"
    groups: int | None = None
    prediction: Literal["v", "epsilon"] | None = None
    dtype: str | None = None
    ema: bool = False
    full: bool = False
    autoencoder: Path | None = None
    text_weights: Path | None = None
    text_model: str | None = None


def export_weights(wanted: Wanted, tell: Callable[[str], None]) -> None:
    """Write weights for other tools; `tell` is called with a sentence for each thing to know.

    Raises UserError where the source cannot be read or does not tell what must be known, and where
    the output exists or cannot be written.
    """
    source, output = wanted.source, wanted.output
    state, model = read_unet(source, wanted.groups, wanted.ema)
    diffusion = _diffusion(wanted)
    named, companions = _companions(wanted, model)
    if wanted.dtype is not None:
        state = in_dtype(state, wanted.dtype, source)
        companions.to_dtype(wanted.dtype)
    if wanted.format == "ldm":
        told = {"sd_perf.source": str(source)}
        export_ldm(state, output, told, model, diffusion, companions.by_component())
        if {model.resblock_groups, model.transformer_groups} != {OTHERS_GROUPS}:
            tell(_trap(model))
    else:
        assert diffusion is not None
        trained = _trained(source)
        exported = Exported(
            source=source,
            trained=trained,
            model=model,
            diffusion=diffusion,
            parameters=sum(value.numel() for value in state.values()),
            dtype=dtypes_of(state),
            ema=wanted.ema,
            named=named,
            missing=companions.missing,
        )
        side = trained.config.data.latent_size if trained else DataConfig.latent_size
        export_pipeline(state, companions, output, model, diffusion, side, model_card(exported))
        if companions.missing:
            tell(f"{output}: is no whole pipeline; it lacks {'; and '.join(companions.missing)}")
    tell(f"{len(state)} tensors of {source} -> {output}")


def _diffusion(wanted: Wanted) -> DiffusionConfig | None:
    """Noise schedule and target; None where neither the source nor the user tells the target, and
    the format needs none."""
    told, asked = told_diffusion(wanted.source).get("prediction"), wanted.prediction
    if told and asked and told != asked:
        raise CheckpointError(
            f"--prediction: {asked} cannot be used, since {wanted.source} says {told}; leave it out"
        )
    if not told and not asked:
        if wanted.format == "ldm":
            return None
        raise CheckpointError(
            f"{wanted.source}: does not tell what its UNet predicts; add --prediction epsilon for "
            "stable-diffusion-2-base and 2-1-base, --prediction v for 2, 2-1 and the benchmark's "
            "network"
        )
    diffusion = read_diffusion(wanted.source)
    return replace(diffusion, prediction=asked) if asked else diffusion


def _companions(wanted: Wanted, model: UNetConfig) -> tuple[Named, Companions]:
    """The frozen networks to export beside the UNet, and where they are."""
    options = {
        "autoencoder": wanted.autoencoder,
        "text_model": wanted.text_model,
        "text_weights": wanted.text_weights,
    }
    given = {name: str(value) for name, value in options.items() if value is not None}
    if wanted.format == "ldm" and not wanted.full:
        for name in given:
            raise UserError(f"--{name.replace('_', '-')}: is for --full or --format diffusers")
        return Named(), Companions()
    named = replace(named_by(wanted.source), **given)
    required = {*given, *(["text_weights"] if "text_model" in given else [])}
    companions = find_companions(named, model, required)
    if wanted.full and companions.missing:
        raise UserError(f"--full: cannot be, for want of {'; and '.join(companions.missing)}")
    return named, companions


def _trained(source: Path) -> Trained | None:
    """The run and position of a source that is a run or a checkpoint."""
    if is_weight_file(source) or is_diffusers_folder(source):
        return None
    checkpoint, run = newest_checkpoint(source)
    state = read_state(checkpoint)
    return Trained(
        folder=run,
        config=read_run_config(run),
        samples=state["samples"],
        steps=state["steps"],
        dataset=state["dataset"]["samples"],
    )


def _trap(model: UNetConfig) -> str:
    return (
        f"the network has {model.resblock_groups} GroupNorm groups in ResBlocks and head and "
        f"{model.transformer_groups} before transformers, which no LDM file can tell: tools other "
        f"than sd-perf take {OTHERS_GROUPS} everywhere, load these weights without an error, and "
        "draw other pictures; for them use --format diffusers"
    )
