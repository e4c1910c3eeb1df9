"""The UNet in this folder, for diffusers: `from load_unet import load_unet`, `load_unet()`.

The network normalises its ResBlocks and its head in `norm_num_groups` groups of channels, and the
entrance of its transformers in `transformer_norm_num_groups`. A stock UNet2DConditionModel has the
first number alone, and group counts leave no trace in the shapes of weights: it would load these
weights and compute something else. The config therefore names a middle block that stock diffusers
does not know, so that `from_pretrained` stops. The class here names the real one, and sets the
norms that the stock model gets wrong.

A pipeline whose model_index.json names this class loads it from this file; to any other pipeline,
give the result as its `unet`. `save_pretrained` of the result keeps the numbers, but not this file:
copy it.
"""

from pathlib import Path
from typing import Any

from diffusers import Transformer2DModel, UNet2DConditionModel

GROUPS = "transformer_norm_num_groups"


class MixedGroupsUNet(UNet2DConditionModel):
    """The UNet as it was trained."""

    @classmethod
    def from_config(cls, config, **options):
        entries = {**config, "mid_block_type": "UNetMidBlock2DCrossAttn"}
        groups = entries.pop(GROUPS)
        unet = super().from_config(entries, **options)
        for module in unet.modules():
            if isinstance(module, Transformer2DModel):
                norm: Any = module.get_submodule("norm")  # type: ignore[attr-defined]
                norm.num_groups = groups
        unet.register_to_config(**{GROUPS: groups, "mid_block_type": config["mid_block_type"]})
        return unet


def load_unet(folder=Path(__file__).parent, **options):
    """The UNet as it was trained. Options are those of `UNet2DConditionModel.from_pretrained`."""
    return MixedGroupsUNet.from_pretrained(folder, **options)
