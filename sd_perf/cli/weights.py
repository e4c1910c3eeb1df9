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
    dtype: Literal["float32", "float16", "bfloat16"] | None = None,
    ema: bool = False,
) -> int:
    """Write the UNet's weights for other tools.

    Args:
        source: run folder (its newest checkpoint), checkpoint, folder exported for diffusers, or
            LDM .ckpt/.safetensors
        output: file (ldm) or folder (diffusers) to write; must not exist
        format: ldm: one safetensors file in the names of Stable Diffusion checkpoints; diffusers: a
            folder with unet/ and scheduler/
        groups: GroupNorm groups in ResBlocks and head, where source is a weight file that does not
            tell: 32 in published Stable Diffusion v2, 16 in the benchmark's network
        dtype: number format of the written weights; none: as they are stored
        ema: the moving average of the weights, which training.ema_decay keeps
    """
    from sd_perf.models.diffusers_folder import export_diffusers
    from sd_perf.models.readers import read_diffusion, read_unet
    from sd_perf.models.weight_files import export_ldm, in_dtype

    (state, model), diffusion = read_unet(source, groups, ema), read_diffusion(source)
    if dtype is not None:
        state = in_dtype(state, dtype, source)
    if format == "ldm":
        export_ldm(state, output, {"sd_perf.source": str(source)}, model, diffusion)
    else:
        export_diffusers(state, model, output, diffusion=diffusion)
    print_plain(f"{len(state)} tensors of {source} -> {output}")
    return 0
