import hashlib
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sd_perf.config import UNetConfig
from sd_perf.models.key_maps import diffusers_unet_config, to_diffusers
from sd_perf.models.torchvision_schemas import define_missing_torchvision_ops
from sd_perf.reference.unet import UNet, sinusoidal_embedding

TINY = UNetConfig(
    model_channels=64,
    channel_mult=(1, 2),
    attention_resolutions=(2, 1),
    num_head_channels=32,
    context_dim=24,
)
DEEP = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2, 2),
    num_res_blocks=1,
    attention_resolutions=(2,),
    num_head_channels=16,
    context_dim=24,
    resblock_groups=32,
)
ZERO_INITIALISED = ("out_layers.3.", "proj_out.", "out.2.")


def build(config: UNetConfig, awake: bool = True) -> UNet:
    """A seeded UNet. `awake` leaves no parameter at 0 or 1, so every weight has an effect."""
    torch.manual_seed(0)
    unet = UNet(config)
    if awake:
        for parameter in unet.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
    return unet


def inputs(config: UNetConfig, batch: int = 2, size: int = 8, tokens: int = 5):
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, config.in_channels, size, size, generator=generator)
    context = torch.randn(batch, tokens, config.context_dim, generator=generator)
    return latents, torch.tensor([17, 981])[:batch], context


def relative_error(output: torch.Tensor, right: torch.Tensor) -> float:
    return ((output.double() - right.double()).norm() / right.double().norm()).item()


@pytest.fixture(scope="module")
def benchmark_unet() -> UNet:
    with torch.device("meta"):
        return UNet(UNetConfig())


def test_benchmark_parameters(benchmark_unet):
    parts = {
        name: sum(p.numel() for p in part.parameters())
        for name, part in benchmark_unet.named_children()
    }
    assert parts == {
        "time_embed": 2_050_560,
        "input_blocks": 251_918_080,
        "middle_block": 97_693_440,
        "output_blocks": 514_236_480,
        "out": 12_164,
    }
    assert sum(parts.values()) == 865_910_724
    assert len(benchmark_unet.state_dict()) == 686


def test_benchmark_names_and_shapes_are_those_of_ldm(benchmark_unet):
    lines = sorted(
        f"model.diffusion_model.{name} {'x'.join(map(str, value.shape))}"
        for name, value in benchmark_unet.state_dict().items()
    )
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "ecfba4f2cffac6978c8743af9a9ca427df7c061973ef4b297582c390ec970d4c"


def test_benchmark_flops(benchmark_unet):
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        benchmark_unet(
            torch.empty(1, 4, 64, 64), torch.empty(1, dtype=torch.int64), torch.empty(1, 77, 1024)
        )
    assert counter.get_total_flops() / 1e9 == pytest.approx(804.3, abs=0.05)


def test_zero_initialised_tensors(benchmark_unet):
    zeros = {name for name, value in build(TINY, awake=False).named_parameters() if not value.any()}
    named = {
        name
        for name, _ in UNet(TINY).named_parameters()
        if any(part in name for part in ZERO_INITIALISED)
    }
    # Norm biases start at 0 too, as in torch; they are no part of the scheme.
    assert {name for name in zeros if not _is_norm(name)} == named
    sizes = [
        value.numel()
        for name, value in benchmark_unet.named_parameters()
        if any(part in name for part in ZERO_INITIALISED)
    ]
    assert (len(sizes), sum(sizes)) == (78, 212_421_764)


def _is_norm(name: str) -> bool:
    return any(part in name for part in ("norm", "in_layers.0", "out_layers.0", "out.0"))


def test_output_starts_at_zero():
    assert not build(TINY, awake=False)(*inputs(TINY)).any()


def test_time_embedding_is_cosines_then_sines():
    timesteps = torch.tensor([0, 1, 999])
    features = sinusoidal_embedding(timesteps, 320)
    assert (features.shape, features.dtype) == ((3, 320), torch.float32)
    for row, t in enumerate(timesteps.tolist()):
        for i in (0, 1, 80, 159):
            angle = t * math.exp(-math.log(10_000) * i / 160)
            assert features[row, i].item() == pytest.approx(math.cos(angle), abs=1e-4)
            assert features[row, 160 + i].item() == pytest.approx(math.sin(angle), abs=1e-4)


@pytest.mark.parametrize("config", [TINY, DEEP], ids=["tiny", "deep"])
def test_equals_diffusers(config):
    define_missing_torchvision_ops()
    diffusers = pytest.importorskip("diffusers")
    config = UNetConfig(**{**vars(config), "resblock_groups": 32, "transformer_groups": 32})
    unet = build(config).double()  # in float64 even another eps in a norm would show
    stock = diffusers.UNet2DConditionModel.from_config(diffusers_unet_config(config)).double()
    stock.load_state_dict(to_diffusers(unet.state_dict(), config))
    latents, timesteps, context = inputs(config)
    with torch.no_grad():
        right = stock(latents.double(), timesteps, context.double()).sample
        assert relative_error(unet(latents.double(), timesteps, context.double()), right) < 1e-10


def test_every_parameter_reaches_the_output():
    unet = build(TINY)
    unet(*inputs(TINY)).square().mean().backward()
    assert [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_samples_do_not_see_each_other():
    unet = build(TINY)
    latents, timesteps, context = inputs(TINY)
    with torch.no_grad():
        both = unet(latents, timesteps, context)
        second = unet(latents[1:], timesteps[1:], context[1:])
    assert relative_error(both[1:], second) < 1e-5


def test_channels_last_is_the_same_function():
    unet = build(TINY)
    latents, timesteps, context = inputs(TINY)
    with torch.no_grad():
        right = unet(latents, timesteps, context)
        unet = unet.to(memory_format=torch.channels_last)
        output = unet(latents.to(memory_format=torch.channels_last), timesteps, context)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(output, right) < 1e-5


@pytest.mark.parametrize(
    "memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
def test_bfloat16_autocast(memory_format):
    unet = build(TINY)
    with torch.no_grad():
        right = unet(*inputs(TINY))
    unet = unet.to(memory_format=memory_format)
    latents, timesteps, context = inputs(TINY)
    with torch.autocast("cpu", torch.bfloat16):
        output = unet(latents.to(memory_format=memory_format), timesteps, context)
    assert output.dtype == torch.bfloat16
    assert relative_error(output, right) < 0.03
    output.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in unet.parameters())


def test_low_precision_weights():
    unet = build(TINY)
    latents, timesteps, context = inputs(TINY)
    with torch.no_grad():
        right = unet(latents, timesteps, context)
        output = unet.bfloat16()(latents.bfloat16(), timesteps, context.bfloat16())
    assert output.dtype == torch.bfloat16
    assert relative_error(output, right) < 0.03
