"""`sd-perf export`: weights for other tools."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from sd_perf.cli.console import print_plain


def export(source: Path, output: Path, format: Literal["ldm", "diffusers"] = "ldm") -> int:
    """Write the UNet's weights for other tools.

    Args:
        source: run folder (its newest checkpoint), checkpoint, folder exported for diffusers, or
            LDM .ckpt/.safetensors
        output: file (ldm) or folder (diffusers) to write; must not exist
        format: ldm: one safetensors file in the names of Stable Diffusion checkpoints; diffusers: a
            folder with unet/
    """
    from sd_perf.models.readers import read_unet
    from sd_perf.models.weight_files import export_diffusers, export_ldm

    state, model = read_unet(source)
    if format == "ldm":
        export_ldm(state, output, {"sd_perf.source": str(source)})
    else:
        export_diffusers(state, model, output)
    print_plain(f"{len(state)} tensors of {source} -> {output}")
    return 0
