"""The autoencoder: parameters, names, work, and its output against diffusers' AutoencoderKL."""

import hashlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sd_perf.models.key_maps import to_diffusers
from sd_perf.models.torchvision_schemas import define_missing_torchvision_ops
from sd_perf.models.vae import AutoencoderConfig, AutoencoderKL

TINY = AutoencoderConfig(channels=16, channel_mult=(1, 2, 4), num_res_blocks=1, groups=8)
WIDE = AutoencoderConfig(
    channels=16, channel_mult=(1, 3), num_res_blocks=2, latent_channels=3, groups=4
)


def build(config: AutoencoderConfig) -> AutoencoderKL:
    """A seeded autoencoder whose norms are not the identity, so every weight has an effect."""
    torch.manual_seed(0)
    vae = AutoencoderKL(config)
    for parameter in vae.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return vae


def relative_error(output: torch.Tensor, right: torch.Tensor) -> float:
    return ((output.double() - right.double()).norm() / right.double().norm()).item()


@pytest.fixture(scope="module")
def stable_diffusion_vae() -> AutoencoderKL:
    with torch.device("meta"):
        return AutoencoderKL()


def test_parameters(stable_diffusion_vae):
    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(stable_diffusion_vae) == 83_653_863
    assert count(stable_diffusion_vae.encoder) == 34_163_592
    assert count(stable_diffusion_vae.decoder) == 49_490_179
    assert len(stable_diffusion_vae.state_dict()) == 248


def test_names_and_shapes_are_those_of_ldm(stable_diffusion_vae):
    lines = sorted(
        f"first_stage_model.{name} {'x'.join(map(str, value.shape))}"
        for name, value in stable_diffusion_vae.state_dict().items()
    )
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "19daf3f24c5da981f19a01e27175e40b392c6672d6976ffef9d434506afbc2ac"


@pytest.mark.parametrize(
    ("method", "shape", "result", "gigaflops"),
    [
        ("encode", (1, 3, 512, 512), (1, 8, 64, 64), 1116.7),
        ("decode", (1, 4, 64, 64), (1, 3, 512, 512), 2514.5),
    ],
)
def test_flops(stable_diffusion_vae, method, shape, result, gigaflops):
    with FlopCounterMode(display=False) as counter:
        output = getattr(stable_diffusion_vae, method)(torch.empty(shape, device="meta"))
    assert output.shape == result
    assert counter.get_total_flops() / 1e9 == pytest.approx(gigaflops, abs=0.05)


@pytest.mark.parametrize("config", [TINY, WIDE], ids=["tiny", "wide"])
def test_equals_diffusers(config):
    define_missing_torchvision_ops()
    diffusers = pytest.importorskip("diffusers")
    vae, levels = (
        build(config).double(),
        len(config.channel_mult),
    )  # in float64 even another eps would show
    stock = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=config.widths,
        layers_per_block=config.num_res_blocks,
        latent_channels=config.latent_channels,
        norm_num_groups=config.groups,
    ).double()
    stock.load_state_dict(to_diffusers(vae.state_dict(), config))
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(2, 3, 24, 16, generator=generator).double() * 2 - 1
    size = (24 // config.downsampling, 16 // config.downsampling)
    z0 = torch.randn(2, config.latent_channels, *size, generator=generator).double()
    with torch.no_grad():
        moments = vae.encode(images)
        assert moments.shape == (2, 2 * config.latent_channels, *size)
        # diffusers clamps log-variances; random weights give none that it would reach
        assert relative_error(moments, stock.encode(images).latent_dist.parameters) < 1e-10
        assert relative_error(vae.decode(z0), stock.decode(z0).sample) < 1e-10


def test_channels_last_and_bfloat16():
    vae = build(TINY)
    images = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        right = vae.encode(images)
        vae = vae.to(memory_format=torch.channels_last)
        assert (
            relative_error(vae.encode(images.to(memory_format=torch.channels_last)), right) < 1e-5
        )
        with torch.autocast("cpu", torch.bfloat16):
            assert relative_error(vae.encode(images), right) < 0.03
