"""Loads the UNet in this folder into diffusers: `from load_unet import load_unet`, `load_unet()`.

The network normalises its ResBlocks and its head in `norm_num_groups` groups of channels, and the
entrance of its transformers in `transformer_norm_num_groups`. A stock UNet2DConditionModel has the
first number alone, and group counts leave no trace in the shapes of weights: it would load these
weights and compute something else. The config therefore names a middle block that stock diffusers
does not know, so that `from_pretrained` stops. This loader names the real one, and sets the norms
that the stock model gets wrong.

To draw pictures, give the result to a pipeline, as its `unet`. `save_pretrained` of the result
drops the second number: keep this folder.
"""

import json
from pathlib import Path
from typing import Any

from diffusers import Transformer2DModel, UNet2DConditionModel


def load_unet(folder=Path(__file__).parent, **options):
    """The UNet as it was trained. Options are those of `UNet2DConditionModel.from_pretrained`."""
    groups = json.loads((Path(folder) / "config.json").read_text())["transformer_norm_num_groups"]
    options = {"mid_block_type": "UNetMidBlock2DCrossAttn", **options}
    unet = UNet2DConditionModel.from_pretrained(folder, **options)
    for module in unet.modules():
        if isinstance(module, Transformer2DModel):
            norm: Any = module.get_submodule("norm")  # type: ignore[attr-defined]
            norm.num_groups = groups
    return unet
