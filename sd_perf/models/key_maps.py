"""Names of the same weights in LDM checkpoints and in diffusers.

LDM (`ldm/modules/diffusionmodules/openaimodel.py` and `model.py`) numbers blocks in the order they
run. diffusers (`models/unets/unet_2d_condition.py`, `models/autoencoders/autoencoder_kl.py`)
numbers them by level. The names follow from the config, for any number of levels and of blocks per
level.

Both directions use one table of module paths (`module_map`). A weight is renamed by the longest
path in the table that its name starts with, and keeps the rest of its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sd_perf.config import DiffusionConfig, UNetConfig
from sd_perf.errors import CheckpointError, ConfigError
from sd_perf.models.vae import IMAGE_CHANNELS, AutoencoderConfig

PREDICTION_TYPES = {"v": "v_prediction", "epsilon": "epsilon"}
"""what a UNet predicts, in this trainer's config: in that of a diffusers scheduler"""

_UNET_RES_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE_RES_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
_VAE_ATTENTION = {
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
}


def to_diffusers(
    state: Mapping[str, Tensor], config: UNetConfig | AutoencoderConfig
) -> dict[str, Tensor]:
    """Rename a state dict from LDM's names (without checkpoint prefix) to diffusers' names.

    The tensors share memory with the input. The VAE's attention projections are 1x1 convolutions in
    LDM and linear layers in diffusers: (C, C, 1, 1) -> (C, C). Raises CheckpointError for a name
    that a model of this config does not have.
    """
    table = module_map(config)
    return {
        _renamed(key, table): value[:, :, 0, 0] if _is_squeezed(key, value, dims=4) else value
        for key, value in state.items()
    }


def from_diffusers(
    state: Mapping[str, Tensor], config: UNetConfig | AutoencoderConfig
) -> dict[str, Tensor]:
    """The inverse of `to_diffusers`, with the same errors."""
    table = {theirs: ours for ours, theirs in module_map(config).items()}
    renamed = {_renamed(key, table): value for key, value in state.items()}
    return {
        key: value[:, :, None, None] if _is_squeezed(key, value, dims=2) else value
        for key, value in renamed.items()
    }


def diffusers_unet_config(config: UNetConfig, sample_size: int = 64) -> dict[str, Any]:
    """The content of `config.json` for this network as a diffusers `UNet2DConditionModel`.

    sample_size: side of the latents that pipelines draw by default.

    diffusers has one number of groups for all GroupNorms. It gets that of the ResBlocks. Where the
    transformers have another number, it stands under `transformer_norm_num_groups`, which stock
    diffusers reports as unexpected and ignores.

    Raises ConfigError where channel_mult does not start with 1: diffusers cannot express it.
    """
    if config.channel_mult[0] != 1:
        raise ConfigError(
            f"model.channel_mult: {config.channel_mult} has no form in diffusers; it must start "
            "with 1"
        )
    attends = [
        2**level in config.attention_resolutions for level in range(len(config.channel_mult))
    ]
    widths = [mult * config.model_channels for mult in config.channel_mult]
    entries = {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        # Despite the name, this is the number of heads per level (huggingface/diffusers#2011).
        "attention_head_dim": [width // config.num_head_channels for width in widths],
        "block_out_channels": widths,
        "center_input_sample": False,
        "cross_attention_dim": config.context_dim,
        "down_block_types": [
            "CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends
        ],
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": config.in_channels,
        "layers_per_block": config.num_res_blocks,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_eps": 1e-5,
        "norm_num_groups": config.resblock_groups,
        "out_channels": config.out_channels,
        "sample_size": sample_size,
        "up_block_types": [
            "CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)
        ],
        "use_linear_projection": True,
    }
    if config.transformer_groups != config.resblock_groups:
        entries["transformer_norm_num_groups"] = config.transformer_groups
    return entries


def diffusers_autoencoder_config(
    config: AutoencoderConfig, latent_scale: float, latent_size: int
) -> dict[str, Any]:
    """The content of `config.json` for this network as a diffusers `AutoencoderKL`.

    latent_scale: DiffusionConfig's; latent_size: side of the latents that pipelines draw by
    default. Raises ConfigError where channel_mult does not start with 1: diffusers cannot express
    it.
    """
    if config.channel_mult[0] != 1:
        raise ConfigError(
            f"the autoencoder's channel_mult {config.channel_mult} has no form in diffusers; it "
            "must start with 1"
        )
    levels = len(config.channel_mult)
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": config.widths,
        "down_block_types": levels * ["DownEncoderBlock2D"],
        "in_channels": IMAGE_CHANNELS,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.num_res_blocks,
        "norm_num_groups": config.groups,
        "out_channels": IMAGE_CHANNELS,
        "sample_size": config.downsampling * latent_size,
        "scaling_factor": latent_scale,
        "up_block_types": levels * ["UpDecoderBlock2D"],
    }


def scheduler_config(config: DiffusionConfig) -> dict[str, Any]:
    """The content of `scheduler_config.json`: the noise schedule and sampling as `DDIMScheduler`.

    Its timesteps are those of `ddim_timesteps` where the number of steps divides num_timesteps.
    """
    return {
        "_class_name": "DDIMScheduler",
        "beta_end": config.beta_end,
        "beta_schedule": "scaled_linear",
        "beta_start": config.beta_start,
        "clip_sample": False,
        "num_train_timesteps": config.num_timesteps,
        "prediction_type": PREDICTION_TYPES[config.prediction],
        "rescale_betas_zero_snr": config.zero_terminal_snr,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "thresholding": False,
        "timestep_spacing": "trailing" if config.zero_terminal_snr else "leading",
        "trained_betas": None,
    }


def module_map(config: UNetConfig | AutoencoderConfig) -> dict[str, str]:
    """{module path in LDM: module path in diffusers}, one to one.

    Below these paths the names are equal in both.
    """
    return _unet_map(config) if isinstance(config, UNetConfig) else _vae_map(config)


def _unet_map(config: UNetConfig) -> dict[str, str]:
    levels = len(config.channel_mult)
    down_blocks, up_blocks = config.num_res_blocks, config.num_res_blocks + 1
    attends = [2**level in config.attention_resolutions for level in range(levels)]
    table = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.1": "mid_block.attentions.0",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    table |= _below("middle_block.0", "mid_block.resnets.0", _UNET_RES_BLOCK)
    table |= _below("middle_block.2", "mid_block.resnets.1", _UNET_RES_BLOCK)

    for level in range(levels):
        # input_blocks.0 is conv_in; a level has its blocks and then a downsampler
        first, theirs = 1 + level * (down_blocks + 1), f"down_blocks.{level}"
        table |= _blocks("input_blocks", first, theirs, down_blocks, attends[level])
        if level < levels - 1:
            table[f"input_blocks.{first + down_blocks}.0.op"] = f"{theirs}.downsamplers.0.conv"

    for step, level in enumerate(reversed(range(levels))):
        first, theirs = step * up_blocks, f"up_blocks.{step}"
        table |= _blocks("output_blocks", first, theirs, up_blocks, attends[level])
        if level > 0:
            place = 2 if attends[level] else 1  # after the ResBlock and, if any, the transformer
            table[f"output_blocks.{first + up_blocks - 1}.{place}.conv"] = (
                f"{theirs}.upsamplers.0.conv"
            )
    return table


def _blocks(ours: str, first: int, theirs: str, count: int, attend: bool) -> dict[str, str]:
    """Paths of one level's blocks: a ResBlock each, and a transformer where the level attends."""
    table: dict[str, str] = {}
    for block in range(count):
        table |= _below(f"{ours}.{first + block}.0", f"{theirs}.resnets.{block}", _UNET_RES_BLOCK)
        if attend:
            table[f"{ours}.{first + block}.1"] = f"{theirs}.attentions.{block}"
    return table


def _vae_map(config: AutoencoderConfig) -> dict[str, str]:
    levels = len(config.channel_mult)
    table = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for part in ("encoder", "decoder"):
        table |= _below(
            part, part, {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}
        )
        table |= _below(f"{part}.mid.block_1", f"{part}.mid_block.resnets.0", _VAE_RES_BLOCK)
        table |= _below(f"{part}.mid.attn_1", f"{part}.mid_block.attentions.0", _VAE_ATTENTION)
        table |= _below(f"{part}.mid.block_2", f"{part}.mid_block.resnets.1", _VAE_RES_BLOCK)
    for level in range(levels):
        down, down_theirs = f"encoder.down.{level}", f"encoder.down_blocks.{level}"
        # LDM's decoder numbers levels by resolution, diffusers' by the order they run in.
        up, up_theirs = f"decoder.up.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        for block in range(config.num_res_blocks):
            table |= _below(
                f"{down}.block.{block}", f"{down_theirs}.resnets.{block}", _VAE_RES_BLOCK
            )
        for block in range(config.num_res_blocks + 1):
            table |= _below(f"{up}.block.{block}", f"{up_theirs}.resnets.{block}", _VAE_RES_BLOCK)
        if level < levels - 1:
            table[f"{down}.downsample.conv"] = f"{down_theirs}.downsamplers.0.conv"
        if level > 0:
            table[f"{up}.upsample.conv"] = f"{up_theirs}.upsamplers.0.conv"
    return table


def _below(ours: str, theirs: str, names: Mapping[str, str]) -> dict[str, str]:
    """The table `names`, {our name: their name}, below two module paths."""
    return {f"{ours}.{name}": f"{theirs}.{their_name}" for name, their_name in names.items()}


def _renamed(key: str, table: Mapping[str, str]) -> str:
    """A weight's new name: its longest path that is in the table, replaced."""
    path, rest = key, ""
    while path not in table:
        path, dot, last = path.rpartition(".")
        if not dot:
            raise CheckpointError(
                f"{key}: not the name of a weight of this model; check that the config is the "
                "weights'"
            )
        rest = f".{last}{rest}"
    return table[path] + rest


def _is_squeezed(ldm_key: str, value: Tensor, dims: int) -> bool:
    """Whether this is the weight of a projection in the VAE's attention, of `dims` dimensions."""
    return ".mid.attn_1." in ldm_key and value.dim() == dims
