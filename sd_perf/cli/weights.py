"""`sd-perf export`: weights for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sd_perf.cli.console import print_plain


def export(
    source: Path,
    output: Path,
    format: Literal["ldm", "diffusers"] = "ldm",
    groups: Literal[16, 32] | None = None,
    prediction: Literal["v", "epsilon"] | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    ema: bool = False,
    full: bool = False,
    autoencoder: Path | None = None,
    text_weights: Path | None = None,
    text_model: str | None = None,
) -> int:
    """Write weights for other tools: the UNet's and, for whole pipelines, those of the frozen
    networks beside it.

    A diffusers folder gets vae/, text_encoder/ and tokenizer/, too, where their files are at hand:
    `StableDiffusionPipeline.from_pretrained` then opens it whole.

    Args:
        source: run folder (its newest checkpoint), checkpoint, folder exported for diffusers, or
            LDM .ckpt/.safetensors
        output: file (ldm) or folder (diffusers) to write; must not exist
        format: ldm: one safetensors file in the names of Stable Diffusion checkpoints; diffusers: a
            folder with unet/, scheduler/ and README.md, its model card
        groups: GroupNorm groups in ResBlocks and head, where source is a weight file that does not
            tell: 32 in published Stable Diffusion v2, 16 in the benchmark's network
        prediction: what the UNet predicts, where source does not tell: epsilon in 2-base and
            2-1-base; v in 2, 2-1 and the benchmark's network
        dtype: number format of the written weights; none: as they are stored, the frozen networks'
            as float32
        ema: the moving average of the weights, which training.ema_decay keeps
        full: all networks or none: an LDM file gets autoencoder and text encoder, too, as ComfyUI
            and others take it
        autoencoder: .ckpt or .safetensors that holds it (default: the run's evaluation.autoencoder
            or data.autoencoder; source itself, where that is an LDM file)
        text_weights: file of the text encoder (default: the run's text_encoder.weights; source
            itself, where that is an LDM file)
        text_model: open_clip's name of the text encoder, or the path of its JSON (default: the
            run's text_encoder.model; ViT-H-14)
    """
    from sd_perf.tools.export import Wanted, export_weights

    wanted = Wanted(
        source=source,
        output=output,
        format=format,
        groups=groups,
        prediction=prediction,
        dtype=dtype,
        ema=ema,
        full=full,
        autoencoder=autoencoder,
        text_weights=text_weights,
        text_model=text_model,
    )
    export_weights(wanted, print_plain)
    return 0
