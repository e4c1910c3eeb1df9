"""The fast UNet against the plain one: the same parameters, the same function, from whatever
operators."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from sd_kernels import launch, selection
from sd_kernels.errors import require_convolution
from sd_kernels.registry import all_ops
from sd_kernels.spec import Target
from sd_perf.config import Config, KernelsConfig, PrecisionConfig, UNetConfig
from sd_perf.diffusion.ddim import ddim_sample
from sd_perf.fast.choice import choose_kernels
from sd_perf.fast.ops import Op, Ops
from sd_perf.fast.unet import FastUNet
from sd_perf.reference.unet import UNet

TINY = UNetConfig(model_channels=32, num_head_channels=16, context_dim=24)
SHALLOW = replace(
    TINY, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(2,), resblock_groups=32
)
LEVELS = replace(TINY, channel_mult=(2, 1), num_res_blocks=3, attention_resolutions=())
REFERENCE = KernelsConfig(
    **{field.name: "reference" for field in fields(KernelsConfig) if field.name != "strict"}
)


def reasons_against(op: str, backend: str) -> list[str]:
    """Why it does not run here outside Triton's interpreter."""
    target = replace(Target.here(), interpreted=False)
    return selection.reasons_against(all_ops()[op].backend(backend), target, (), torch.float32)


def built(
    config: UNetConfig, kernels: KernelsConfig = REFERENCE, precision: PrecisionConfig | None = None
) -> FastUNet:
    config, precision = replace(config, implementation="fast"), precision or PrecisionConfig()
    choices = choose_kernels(
        Config(model=config, kernels=kernels, precision=precision), Target.here()
    )
    return FastUNet(config, Ops.chosen(choices), precision)


def randomised(unet: torch.nn.Module) -> torch.nn.Module:
    """No layer at its initial zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    return unet


def results(
    unet: torch.nn.Module, dtype: torch.dtype, side: int = 16, context: tuple[int, int] = (7, 24)
) -> list[torch.Tensor]:
    """Prediction and all gradients, detached."""
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, 4, side, 2 * side, generator=generator, dtype=torch.float64).to(dtype)
    text = torch.randn(2, *context, generator=generator, dtype=torch.float64).to(dtype)
    v = unet(latents, torch.tensor([3, 700]), text)
    weights = torch.randn(v.shape, generator=generator, dtype=torch.float64).to(v.dtype)
    parameters = list(unet.parameters())
    grads = torch.autograd.grad((v * weights).sum(), parameters, allow_unused=True)
    return [
        v.detach(),
        *(torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)),
    ]


def largest_difference(ours: list[torch.Tensor], exact: list[torch.Tensor]) -> float:
    """Relative to each tensor's norm; a gradient that is zero but for rounding counts by a
    thousandth."""
    pairs = zip(ours, exact, strict=True)
    return max(float((a.double() - b).norm() / b.norm().clamp_min(1e-3)) for a, b in pairs)


@pytest.mark.parametrize("config", [TINY, SHALLOW, LEVELS], ids=["tiny", "shallow", "levels"])
def test_is_the_plain_one_in_float64(config: UNetConfig) -> None:
    plain, fast = randomised(UNet(config)).double(), built(config).double()
    fast.load_state_dict(plain.state_dict())
    exact = results(plain, torch.float64)
    assert torch.count_nonzero(exact[0])
    assert largest_difference(results(fast, torch.float64), exact) < 1e-10


@pytest.mark.parametrize(
    "config", [TINY, SHALLOW, LEVELS, UNetConfig()], ids=["tiny", "shallow", "levels", "full"]
)
def test_parameters_are_the_plain_ones(config: UNetConfig) -> None:
    with torch.device("meta"):
        plain, fast = UNet(config), built(config)
    names = [(name, parameter.shape) for name, parameter in plain.named_parameters()]
    assert names == [(name, parameter.shape) for name, parameter in fast.named_parameters()]
    assert list(plain.state_dict()) == list(fast.state_dict())


@pytest.mark.parametrize("network", [UNet, built])
def test_text_projected_once_gives_the_same_pictures(network) -> None:
    unet = randomised(network(TINY))
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(2, 4, 16, 16, generator=generator)
    context = torch.randn(2, 7, 24, generator=generator)
    uncond, options = torch.randn(1, 7, 24, generator=generator), (Config().diffusion, 4, 2.0)
    each_time = ddim_sample(unet, noise, context, uncond, *options)
    projected = unet.project_text(context), unet.project_text(uncond)
    once = ddim_sample(unet, noise, *projected, *options)
    assert each_time.std() > 0.1
    # The empty caption is projected alone, a matmul of another size.
    torch.testing.assert_close(once, each_time, rtol=1e-5, atol=1e-5)


def test_initial_weights_are_the_plain_ones() -> None:
    torch.manual_seed(5)
    plain = UNet(TINY).state_dict()
    torch.manual_seed(5)
    for name, value in built(TINY).state_dict().items():
        assert torch.equal(value, plain[name]), name


def test_is_no_further_off_in_bfloat16() -> None:
    plain, fast = randomised(UNet(TINY)), built(TINY, KernelsConfig())
    fast.load_state_dict(plain.state_dict())
    exact = results(randomised(UNet(TINY)).double(), torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        ours, torchs = (
            largest_difference(results(unet, torch.float32)[:1], exact[:1])
            for unet in (fast, plain)
        )
    assert 1e-4 < ours < 2 * torchs


def as_on_a_gpu(ops: Ops) -> Ops:
    """The same operators, with convolutions as strict as cuDNN's adapter, and images checked that
    come out."""

    def conv(x: torch.Tensor, weight: torch.Tensor, **options: int) -> torch.Tensor:
        require_convolution("conv", x, weight)
        return ops.conv(x, weight, **options)

    def checked(op: Op) -> Op:
        def call(*inputs: Any, **options: Any) -> Any:
            results = op(*inputs, **options)
            for result in results if isinstance(results, tuple) else (results,):
                assert result.dim() != 4 or result.is_contiguous(memory_format=torch.channels_last)
            return results

        return call

    return ops.wrapped(lambda name, op: checked(conv if name == "conv" else op))


NOT_OF_THE_UNET = {"diffusion_inputs", "v_mse_loss", "adamw"}
OTHERS = [
    (op, backend.name)
    for op, spec in all_ops().items()
    if op not in NOT_OF_THE_UNET
    for backend in spec.backends
]


@pytest.mark.parametrize(("op", "backend"), [pair for pair in OTHERS if not reasons_against(*pair)])
def test_one_operator_on_any_backend_beside_the_others(op: str, backend: str) -> None:
    """On a CPU; `auto` beside it, which takes what is nearest to a GPU's."""
    plain = randomised(UNet(SHALLOW)).double()
    fast = built(SHALLOW, replace(KernelsConfig(), **{op: backend})).double()
    fast.load_state_dict(plain.state_dict())
    fast.ops = as_on_a_gpu(fast.ops)
    # layer_norm/torch has statistics in float32 on a CPU.
    assert (
        largest_difference(*(results(unet, torch.float64, side=4) for unet in (fast, plain))) < 1e-3
    )


@pytest.mark.slow
def test_runs_on_triton_kernels() -> None:
    """At sizes that the interpreter takes, every operator that has a kernel."""
    config = UNetConfig(
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(),
        num_head_channels=32,
        context_dim=24,
        resblock_groups=16,
        transformer_groups=16,
    )
    named = ("group_norm", "layer_norm", "geglu", "residual_add", "upsample_conv")
    plain, fast = (
        randomised(UNet(config)),
        built(config, replace(REFERENCE, **dict.fromkeys(named, "triton"))),
    )
    fast.load_state_dict(plain.state_dict())
    exact = results(randomised(UNet(config)).double(), torch.float64, side=4)
    before = launch.executed.copy()
    ours, torchs = (
        largest_difference(results(unet, torch.float32, side=4), exact) for unet in (fast, plain)
    )
    assert ours < 2 * torchs
    kernels = {kernel for kernel, count in launch.executed.items() if count > before[kernel]}
    assert len(kernels) >= 2 * len(named)
