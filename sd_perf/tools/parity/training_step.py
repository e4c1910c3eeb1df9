"""Level step: draws, loss, noise over ranks, optimizer, a whole training step, and the sampler.

Shape letters: B samples, C latent channels, S side of the latents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd_perf.config import Config, PrecisionConfig
from sd_perf.data.batch import Batch, LoaderOptions
from sd_perf.data.loaders.synthetic import draw_inputs
from sd_perf.distributed.world import World
from sd_perf.fast.ops import Ops
from sd_perf.fast.step import FusedDiffusionStep
from sd_perf.reference.step import DiffusionStep
from sd_perf.tools.parity.comparison import Comparison, relative_errors
from sd_perf.tools.parity.optimizer_updates import (
    compare_masters,
    compare_optimizer,
    keeps_remainders,
    textbook_changes,
)
from sd_perf.tools.parity.parity_case import SEED, ParityCase
from sd_perf.tools.parity.sampler import compare_sampler
from sd_perf.tools.parity.yardsticks import plain_torch_networks
from sd_perf.training.build_step import build_step
from sd_perf.training.learning_rate import learning_rate
from sd_perf.training.static_batches import Inputs

SAMPLES = 4
RANKS = 2
NOISE_OF_RANKS = "noise of two ranks, samples of which differ"


def compare_steps(case: ParityCase) -> Iterator[Comparison]:
    """All comparisons of the level."""
    yield from _compare_draws(case)
    yield _compare_noise_of_ranks(case)
    yield from compare_optimizer(case.narrowed)
    if keeps_remainders(case):
        yield compare_masters(case)
    if case.where != "interpreter":
        yield from _compare_whole_step(case.narrowed)
        yield from compare_sampler(case)


def _inputs(case: ParityCase) -> Inputs:
    config, indices = case.config, torch.arange(SAMPLES, device=case.device)
    latents = config.model.in_channels, case.side, case.side
    text = config.data.context_tokens, config.model.context_dim
    moments, context = draw_inputs(SEED, indices, latents, text, config.diffusion.latent_scale)
    return Inputs(indices, moments, context)


def _compare_draws(case: ParityCase) -> Iterator[Comparison]:
    """The fused draws against those of the plain step; the fused loss and its gradient."""
    inputs, step = _inputs(case), _diffusion(case.config).to(case.device)
    latents, noise, timesteps = step.draw(inputs.moments, inputs.sample_indices)
    schedule, comparer = step.schedule, case.comparer("step", "float32")
    plain = [
        schedule.add_noise(latents, noise, timesteps),
        schedule.target(latents, noise, timesteps),
    ]
    fused = FusedDiffusionStep(_trained_in("float32", case.config), SEED, case.ops).to(case.device)
    noisy, target, drawn = fused.draw(inputs.moments, inputs.sample_indices)
    yield case.comparer("step", "int64").equal(
        "timesteps drawn", different=_share(drawn != timesteps)
    )
    yield comparer.tensors(
        "noisy latents and target",
        fast=[noisy, target],
        torch_results=[plain],
        # The plain draws are the truth: they are float32 by definition.
        truth=[value.double() for value in plain],
    )

    def loss_and_gradient(loss_of: Any, dtype: torch.dtype) -> list[Tensor]:
        prediction = plain[0].to(dtype).requires_grad_()
        loss = loss_of(prediction, plain[1].to(dtype))
        return [loss.detach(), *torch.autograd.grad(loss, prediction)]

    yield comparer.tensors(
        "loss and its gradient",
        fast=loss_and_gradient(case.ops.v_mse_loss, torch.float32),
        torch_results=[loss_and_gradient(F.mse_loss, torch.float32)],
        truth=loss_and_gradient(F.mse_loss, torch.float64),
    )


def _share(different: Tensor) -> float:
    """The share of true elements."""
    return different.double().mean().item()


def _compare_noise_of_ranks(case: ParityCase) -> Comparison:
    """The noise of a batch must not depend on how its samples are divided over ranks."""
    step = _diffusion(case.config).to(case.device)
    shape = 2 * case.config.model.in_channels, case.side, case.side

    def noise(rank: int, ranks: int) -> Tensor:
        options = LoaderOptions(
            seed=SEED,
            global_batch_size=RANKS * SAMPLES,
            micro_batch_size=RANKS * SAMPLES // ranks,
            rank=rank,
            world_size=ranks,
        )
        indices = torch.from_numpy(next(options.positions(0))).to(case.device)
        moments = torch.zeros(len(indices), *shape, device=case.device)
        return step.draw(moments, indices)[1]

    divided = torch.stack([noise(rank, RANKS) for rank in range(RANKS)], dim=1).flatten(0, 1)
    different = (divided != noise(0, 1)).flatten(1).any(dim=1)
    return case.comparer("step", "float32").equal(NOISE_OF_RANKS, different=_share(different))


def _compare_whole_step(case: ParityCase) -> Iterator[Comparison]:
    """Loss and change of the weights in one step of the trainer, with both networks."""
    inputs = _inputs(case)
    for dtype in case.dtypes:
        comparer = case.comparer("step", dtype)
        config = _of_size(_trained_in(dtype, case.config), inputs)
        plain = dataclasses.replace(config, model=config.model.network, precision=PrecisionConfig())
        fast = _train_one_step(case.fast_network(dtype), config, inputs, ops=case.ops)
        by_torch = [
            _train_one_step(unet, plain, inputs, ops=None)
            for unet in plain_torch_networks(case, dtype)
        ]
        truth = _exact_step(case, config, inputs)
        # In 16 bits the error of a loss, a single number, is a matter of chance.
        if dtype == "float32":
            yield comparer.tensors(
                "loss",
                fast=fast[:1],
                torch_results=[result[:1] for result in by_torch],
                truth=truth[:1],
            )
        yield comparer.errors(
            "weights after one step",
            fast=relative_errors(_joined(fast), _joined(truth)),
            torch_errors=[relative_errors(_joined(some), _joined(truth)) for some in by_torch],
            # Where rounding turns a gradient's sign, AdamW's first step goes the other way.
            limit_max=False,
            note="largest: not limited",
        )


def _train_one_step(
    unet: nn.Module, config: Config, inputs: Inputs, *, ops: Ops | None
) -> list[Tensor]:
    """The loss of a step after warm-up, then the change (float64) of every weight.

    `ops` are the fast network's operators, None for the plain one.
    """
    world = World(rank=0, size=1, device=inputs.moments.device)
    step = build_step(unet, config, seed=SEED, world=world, text_encoder=None, ops=ops)
    names = [f"model.{name}" for name, _ in unet.named_parameters()]
    start = step.state()
    before = [start[name].double() for name in names]
    captions = [""] * len(inputs.sample_indices)
    batch = Batch(inputs.sample_indices, inputs.moments, captions, inputs.context)
    loss, _ = step(iter([batch]), 0)
    after = step.state()
    return [loss, *(after[name].double() - was for name, was in zip(names, before, strict=True))]


def _of_size(config: Config, inputs: Inputs) -> Config:
    """The config with the sizes of the inputs, and its own full learning rate from step 0."""
    samples, side = len(inputs.sample_indices), inputs.moments.shape[-1]
    return dataclasses.replace(
        config,
        training=dataclasses.replace(
            config.training, global_batch_size=samples, accumulate_steps=1
        ),
        optimizer=dataclasses.replace(
            config.optimizer, base_learning_rate=config.learning_rate / samples, warmup_steps=0
        ),
        data=dataclasses.replace(config.data, latent_size=side),
    )


def _joined(results: list[Tensor]) -> list[Tensor]:
    """All changes, without the loss, as one tensor."""
    return [torch.cat([change.flatten() for change in results[1:]])]


def _trained_in(dtype: str, config: Config) -> Config:
    """The config itself in bfloat16; else the same training in float32, without FP8."""
    if dtype == "bfloat16":
        return config
    training = dataclasses.replace(config.training, precision="fp32")
    return dataclasses.replace(config, training=training, precision=PrecisionConfig())


def _exact_step(case: ParityCase, config: Config, inputs: Inputs) -> list[Tensor]:
    """Loss and changes in float64, but for the draws, which are float32 by definition."""
    unet = case.plain_network(torch.float64)
    start = [parameter.detach().float() for parameter in unet.parameters()]
    step = _diffusion(config).to(case.device)
    latents, noise, timesteps = step.draw(inputs.moments, inputs.sample_indices)
    noisy = step.schedule.add_noise(latents, noise, timesteps).double()
    target = step.schedule.target(latents, noise, timesteps).double()
    predicted = unet(noisy, timesteps, inputs.context.double())
    loss = F.mse_loss(*step.schedule.weighed(predicted, target, timesteps))
    loss.backward()
    grads = [[parameter.grad for parameter in unet.parameters() if parameter.grad is not None]]
    rate = learning_rate(config.optimizer, config.learning_rate, step=0)
    return [loss.detach(), *textbook_changes(config, start, grads, rate)]


def _diffusion(config: Config) -> DiffusionStep:
    """The plain diffusion step of a config."""
    return DiffusionStep(config.diffusion, SEED, config.training.min_snr_gamma)
