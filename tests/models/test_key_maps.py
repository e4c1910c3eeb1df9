"""Names of weights against diffusers' own models, in both directions."""

import hashlib

import pytest
import torch

from sd_perf.config import UNetConfig
from sd_perf.errors import CheckpointError, ConfigError
from sd_perf.models.key_maps import diffusers_unet_config, from_diffusers, module_map, to_diffusers
from sd_perf.models.torchvision_schemas import define_missing_torchvision_ops
from sd_perf.models.vae import AutoencoderConfig, AutoencoderKL
from sd_perf.reference.unet import UNet

UNETS = {
    "benchmark": UNetConfig(),
    "one_level": UNetConfig(model_channels=64, channel_mult=(1,), attention_resolutions=()),
    "one_block": UNetConfig(
        model_channels=64, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,)
    ),
    "five_levels": UNetConfig(
        model_channels=64,
        channel_mult=(1, 1, 2, 2, 3),
        num_res_blocks=3,
        attention_resolutions=(16, 4, 1),
    ),
}
VAES = {
    "stable_diffusion": AutoencoderConfig(),
    "one_level": AutoencoderConfig(channels=32, channel_mult=(1,)),
    "five_levels": AutoencoderConfig(channels=32, channel_mult=(1, 2, 2, 3, 4), num_res_blocks=1),
}
MODELS = [pytest.param(UNet, config, id=f"unet_{name}") for name, config in UNETS.items()]
MODELS += [pytest.param(AutoencoderKL, config, id=f"vae_{name}") for name, config in VAES.items()]


def shapes(state):
    return {name: tuple(value.shape) for name, value in state.items()}


def state_of(model, config):
    with torch.device("meta"):
        return model(config).state_dict()


def stock_state(config):
    """The state dict of diffusers' own model of these sizes, on the meta device."""
    define_missing_torchvision_ops()
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        if isinstance(config, UNetConfig):
            return diffusers.UNet2DConditionModel.from_config(
                diffusers_unet_config(config)
            ).state_dict()
        levels = len(config.channel_mult)
        return diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=config.widths,
            layers_per_block=config.num_res_blocks,
        ).state_dict()


@pytest.mark.parametrize(("model", "config"), MODELS)
def test_names_and_shapes_are_those_of_diffusers(model, config):
    assert shapes(to_diffusers(state_of(model, config), config)) == shapes(stock_state(config))


@pytest.mark.parametrize(("model", "config"), MODELS)
def test_there_and_back(model, config):
    state = state_of(model, config)
    assert shapes(from_diffusers(to_diffusers(state, config), config)) == shapes(state)


@pytest.mark.parametrize(
    ("model", "prefix", "digest"),
    [
        (
            UNet,
            "model.diffusion_model.",
            "3d355a17ce5dcde45ded5a9b6ecfe84cc9a1929d0354955709f14d431b684ae1",
        ),
        (
            AutoencoderKL,
            "first_stage_model.",
            "332c08183dbd1a28dd1868e0e8339261a8aeab1cfd7ad84821e6d470f8e79323",
        ),
    ],
)
def test_published_names(model, prefix, digest):
    config = UNetConfig() if model is UNet else AutoencoderConfig()
    state = state_of(model, config)
    pairs = zip(state, to_diffusers(state, config), strict=True)
    lines = sorted(f"{prefix}{ours} {theirs}" for ours, theirs in pairs)
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == digest


def test_maps_are_one_to_one():
    for config in (*UNETS.values(), *VAES.values()):
        table = module_map(config)
        assert len(set(table.values())) == len(table)


def test_values_are_kept_and_shared():
    config = VAES["one_level"]
    state = AutoencoderKL(config).state_dict()
    renamed = to_diffusers(state, config)
    theirs, ours = (
        "encoder.mid_block.attentions.0.to_out.0.weight",
        "encoder.mid.attn_1.proj_out.weight",
    )
    assert renamed[theirs].data_ptr() == state[ours].data_ptr()
    assert torch.equal(from_diffusers(renamed, config)[ours], state[ours])


@pytest.mark.parametrize("name", ["input_blocks.3.0.op.weight", "label_emb.0.0.weight", "out"])
def test_name_of_another_model(name):
    config = UNETS["one_level"]
    with pytest.raises(CheckpointError, match=name):
        to_diffusers({name: torch.zeros(1)}, config)
    with pytest.raises(CheckpointError, match=name):
        from_diffusers({name: torch.zeros(1)}, config)


def test_config_says_both_group_counts_where_they_differ():
    assert diffusers_unet_config(UNetConfig(resblock_groups=16))["norm_num_groups"] == 16
    assert (
        diffusers_unet_config(UNetConfig(resblock_groups=16))["transformer_norm_num_groups"] == 32
    )
    assert "transformer_norm_num_groups" not in diffusers_unet_config(
        UNetConfig(resblock_groups=32)
    )


def test_config_without_a_form_in_diffusers():
    with pytest.raises(ConfigError, match="channel_mult"):
        diffusers_unet_config(UNetConfig(channel_mult=(2, 4), attention_resolutions=(1,)))
