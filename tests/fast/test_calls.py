"""What the specs say that a UNet calls is what the fast UNet calls: operator by operator, with how
often."""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from sd_kernels.registry import all_ops
from sd_kernels.spec import Case, Inputs, OpSpec, Target
from sd_perf.config import Config, DataConfig, KernelsConfig, UNetConfig
from sd_perf.fast.architecture import architecture
from sd_perf.fast.choice import choose_kernels
from sd_perf.fast.ops import Ops
from sd_perf.fast.unet import FastUNet

# fp8_linear takes the place of others; the last three are the step's and the optimizer's
NAMES = all_ops().keys() - {"fp8_linear", "diffusion_inputs", "v_mse_loss", "adamw"}
BATCH = 2
TINY = UNetConfig(model_channels=32, num_head_channels=16, context_dim=24)
DATA = DataConfig(format="synthetic", latent_size=16, context_tokens=7)
CONFIGS = {
    "benchmark": Config(),
    "tiny": Config(model=TINY, data=DATA),
    "levels": Config(
        model=replace(TINY, channel_mult=(2, 1), num_res_blocks=3, attention_resolutions=()),
        data=DATA,
    ),
    "deep attention": Config(
        model=replace(TINY, channel_mult=(1, 2), attention_resolutions=(2,)), data=DATA
    ),
}


def described(spec: OpSpec, *inputs: Any, **options: Any) -> tuple[Any, ...]:
    """A call's arguments by name: the shapes of tensors (of a linear layer, rows and columns), and
    the options."""
    bound = inspect.signature(spec.reference()).bind(*inputs, **options)
    bound.apply_defaults()

    def shown(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return tuple(
            (value.flatten(0, -2) if spec.name == "linear" and value.dim() > 1 else value).shape
        )

    return tuple((name, shown(value)) for name, value in sorted(bound.arguments.items()))


def specified(spec: OpSpec, config: Config) -> Counter:
    """The calls that the spec tells of the config's UNet."""

    def inputs(case: Case) -> dict[str, Any]:
        case = case.at_batch(BATCH)
        return spec.inputs(case, Inputs(case, torch.float32, empty=True))

    assert spec.cases_of is not None
    calls: Counter = Counter()
    for case in spec.cases_of(architecture(config)):
        calls[described(spec, **inputs(case))] += case.calls
    return calls


def made(config: Config) -> dict[str, Counter]:
    """The calls of one forward pass on the meta device, by operator."""
    calls: dict[str, Counter] = {name: Counter() for name in NAMES}

    def recorded(name: str, op: Any) -> Any:
        def call(*inputs: Any, **options: Any) -> Any:
            calls[name][described(all_ops()[name], *inputs, **options)] += 1
            return op(*inputs, **options)

        return call

    reference = replace(config, kernels=KernelsConfig(**dict.fromkeys(NAMES, "reference")))
    chosen = Ops.chosen(choose_kernels(reference, Target.here()))
    ops = chosen.wrapped(lambda name, op: recorded(name, op) if name in NAMES else op)
    size, model = config.data.latent_size, config.model
    with torch.device("meta"):
        latents = torch.empty(BATCH, model.in_channels, size, size)
        context = torch.empty(BATCH, config.data.context_tokens, model.context_dim)
        # Not `forward`, which asks for autocast, of which the meta device has none.
        unet = FastUNet(model, ops)
        unet._predict(latents, torch.zeros(BATCH, dtype=torch.int64), unet.project_text(context))
    return calls


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_the_specs_have_the_calls_that_are_made(config: Config) -> None:
    calls = made(config)
    for name in NAMES:
        assert calls[name] == specified(all_ops()[name], config), name
