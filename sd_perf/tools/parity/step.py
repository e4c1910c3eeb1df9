"""Level step: draws, loss, optimizer, masters, one whole step, and the steps of the sampler.

Shape letters: B samples, C latent channels, S side of the latents, N parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sd_kernels.adamw.reference import adamw as textbook_adamw
from sd_kernels.adamw.reference import join_master, split_master
from sd_kernels.registry import all_ops
from sd_perf.config import Config, PrecisionConfig
from sd_perf.data.batch import Batch, LoaderOptions
from sd_perf.data.loaders.synthetic import draw_inputs
from sd_perf.diffusion.ddim import ddim_sample, ddim_timesteps
from sd_perf.distributed.world import World
from sd_perf.fast.ops import Ops
from sd_perf.fast.step import FusedDiffusionStep
from sd_perf.reference.step import DiffusionStep
from sd_perf.tools.parity.rows import Row, compared, errors, exact, judged
from sd_perf.tools.parity.subject import SEED, Subject, by_kind
from sd_perf.training.optimizer import build_optimizer, learning_rate
from sd_perf.training.step import TrainStep

SAMPLES = 4
STEPS = 3
RATE = 1e-3
"""learning rate that float32 weights show"""
MASTER_STEPS = 40
RANKS = 2
NOISE_OF_RANKS = "noise of two ranks, samples of which differ"


def compare_steps(subject: Subject) -> Iterator[Row]:
    """All rows of the level."""
    yield from _draws(subject)
    yield _ranks(subject)
    yield from _optimizer(subject.light)
    adamw = all_ops()["adamw"].backend(subject.choices["adamw"].backend)
    if adamw.exact:  # others keep no remainders
        yield _masters(subject)
    if subject.where != "interpreter":
        yield from _whole_step(subject.light)
        yield from _sampler(subject)


def _batch(subject: Subject, samples: int = SAMPLES) -> Batch:
    config, indices = subject.config, torch.arange(samples, device=subject.device)
    latents = config.model.in_channels, subject.side, subject.side
    text = config.data.context_tokens, config.model.context_dim
    moments, context = draw_inputs(SEED, indices, latents, text, config.diffusion.latent_scale)
    return Batch(indices, moments, [""] * samples, context)


def _draws(subject: Subject) -> Iterator[Row]:
    """The fused draws against the plain step's, which are the oracle; the fused loss and its
    gradient."""
    batch, step = _batch(subject), DiffusionStep(subject.config.diffusion, SEED).to(subject.device)
    latents, noise, timesteps = step.draw(batch.moments, batch.sample_indices)
    schedule = step.schedule
    plain = (
        schedule.add_noise(latents, noise, timesteps),
        schedule.v_target(latents, noise, timesteps),
    )
    options = FusedDiffusionStep(subject.config, SEED, subject.ops).options | {
        "dtype": torch.float32
    }
    tables = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
    draw = subject.ops.diffusion_inputs
    noisy, target, drawn = draw(batch.moments, batch.sample_indices, *tables, **options)
    yield exact("step", "timesteps drawn", subject.where, "int64", _share(drawn != timesteps))
    wide = [value.double() for value in plain]
    yield compared(
        "step", "noisy latents and target", subject.where, "float32", [noisy, target], [plain], wide
    )
    losses = []
    for loss_of, dtype in (
        (subject.ops.v_mse_loss, torch.float32),
        (F.mse_loss, torch.float32),
        (F.mse_loss, torch.float64),
    ):
        prediction = plain[0].to(dtype).requires_grad_()
        loss = loss_of(prediction, plain[1].to(dtype))
        losses.append([loss.detach(), *torch.autograd.grad(loss, prediction)])
    ours, by_torch, truth = losses
    yield compared(
        "step", "loss and its gradient", subject.where, "float32", ours, [by_torch], truth
    )


def _share(different: Tensor) -> float:
    return different.double().mean().item()


def _ranks(subject: Subject) -> Row:
    """Noise of a batch divided over ranks, which take every second sample, against that of one
    rank."""
    step = DiffusionStep(subject.config.diffusion, SEED).to(subject.device)
    shape = 2 * subject.config.model.in_channels, subject.side, subject.side

    def noise(rank: int, ranks: int) -> Tensor:
        own = LoaderOptions(
            SEED, RANKS * SAMPLES, RANKS * SAMPLES // ranks, rank=rank, world_size=ranks
        ).positions(0)
        indices = torch.from_numpy(next(own)).to(subject.device)
        return step.draw(torch.zeros(len(indices), *shape, device=subject.device), indices)[1]

    divided = torch.stack([noise(rank, RANKS) for rank in range(RANKS)], dim=1).flatten(0, 1)
    different = (divided != noise(0, 1)).flatten(1).any(dim=1)
    return exact("step", NOISE_OF_RANKS, subject.where, "float32", _share(different))


def _optimizer(subject: Subject) -> Iterator[Row]:
    """The trainer's optimizer and torch's AdamW, unfused, against the formula in float64, given the
    same gradients."""
    unet = subject.plain()
    start = [parameter.detach().clone() for parameter in unet.parameters()]
    generator = torch.Generator().manual_seed(SEED)
    grads = [
        [torch.randn(p.shape, generator=generator).to(p.device) for p in start]
        for _ in range(STEPS)
    ]
    options = subject.config.optimizer
    unfused = torch.optim.AdamW(
        [weights.clone() for weights in start],
        betas=(options.beta_1, options.beta_2),
        eps=options.epsilon,
        weight_decay=options.weight_decay,
        foreach=False,
    )
    optimizers = build_optimizer(unet, subject.config), unfused
    weights = list(unet.parameters()), unfused.param_groups[0]["params"]
    ours, plain = (
        _changes(*of_one, start, grads) for of_one in zip(optimizers, weights, strict=True)
    )
    truth = _textbook(subject.config, start, grads, RATE)
    for kind, numbers in by_kind(unet).items():
        part, by_torch, wide = (
            [changes[number] for number in numbers] for changes in (ours, plain, truth)
        )
        yield compared(
            "step", f"AdamW's change of {kind}", subject.where, "float32", part, [by_torch], wide
        )


def _changes(
    optimizer: torch.optim.Optimizer,
    weights: list[Tensor],
    start: list[Tensor],
    grads: list[list[Tensor]],
) -> list[Tensor]:
    for group in optimizer.param_groups:
        group["lr"] = RATE
    for given in grads:
        for parameter, grad in zip(weights, given, strict=True):
            parameter.grad = grad.clone()
        optimizer.step()
    return [w.detach().double() - first.double() for w, first in zip(weights, start, strict=True)]


def _textbook(
    config: Config, start: list[Tensor], grads: list[list[Tensor]], rate: float
) -> list[Tensor]:
    """Change of every weight by AdamW as its authors wrote it, in float64."""
    constants, changes = _constants(config), []
    for number, first in enumerate(start):
        weights = first.double().flatten().clone()
        moments = torch.zeros_like(weights), torch.zeros_like(weights)
        for step, given in enumerate(grads, start=1):
            scalars = (weights.new_tensor(value) for value in (step, rate))
            grad = given[number].double().flatten()
            textbook_adamw(weights, None, grad, *moments, *scalars, **constants)
        changes.append(weights.view(first.shape) - first.double())
    return changes


def _constants(config: Config) -> dict[str, Any]:
    options = config.optimizer
    betas = {"beta1": options.beta_1, "beta2": options.beta_2}
    return {**betas, "eps": options.epsilon, "weight_decay": options.weight_decay}


def _masters(subject: Subject) -> Row:
    """float32 masters as bfloat16 weights and remainders, over steps too small for bfloat16
    alone."""
    N, device, constants = 4099, subject.device, _constants(subject.config)
    generator = torch.Generator(device).manual_seed(SEED)
    start = torch.randn(N, generator=generator, device=device) * 0.05
    grads = [
        torch.randn(N, generator=generator, device=device).bfloat16() for _ in range(MASTER_STEPS)
    ]
    rate = torch.tensor(1e-6, dtype=torch.float64, device=device)

    def change(
        function: Any, weights: Tensor, remainders: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        moments = [torch.zeros(N, dtype=dtype, device=device) for _ in range(2)]
        for step, grad in enumerate(grads, start=1):
            count = torch.tensor(step, device=device)
            given = grad if remainders is not None else grad.to(dtype)
            function(weights, remainders, given, *moments, count, rate, **constants)
        return (
            weights if remainders is None else join_master(weights, remainders)
        ).double() - start.double()

    ours = change(subject.ops.adamw, *split_master(start), torch.float32)
    plain, truth = (
        change(textbook_adamw, start.to(dtype).clone(), None, dtype)
        for dtype in (torch.float32, torch.float64)
    )
    name = f"masters of bfloat16 weights, {MASTER_STEPS} small steps"
    return compared(
        "step", name, subject.where, "bfloat16 + remainders", [ours], [[plain]], [truth]
    )


def _whole_step(subject: Subject) -> Iterator[Row]:
    """Loss and change of the weights of a training step, as the trainer takes it, with both
    networks."""
    batch = _batch(subject)
    for dtype in subject.dtypes:
        config = _trained_in(subject.config, dtype)
        plain = dataclasses.replace(config, model=config.model.network, precision=PrecisionConfig())
        ours = _stepped(subject.fast(dtype), config, batch, subject, ops=subject.ops)
        by_torch = [
            _stepped(unet, plain, batch, subject, None) for unet in subject.plain_networks(dtype)
        ]
        truth = _exact_step(subject, config, batch)
        if dtype == "float32":  # of one number in 16 bits, chance says how near it comes
            yield compared(
                "step",
                "loss",
                subject.where,
                dtype,
                ours[:1],
                [some[:1] for some in by_torch],
                truth[:1],
            )
        # By their mean square alone: where rounding turns a gradient's sign, AdamW's first step
        # goes the other way.
        mean, *means = (2 * errors(_joined(some), _joined(truth))[1:] for some in (ours, *by_torch))
        yield judged(
            "step",
            "weights after one step",
            subject.where,
            dtype,
            mean,
            means,
            "largest: not looked at",
        )


def _stepped(
    unet: Any, config: Config, batch: Batch, subject: Subject, ops: Ops | None
) -> list[Tensor]:
    """Loss of a step and changes of the weights; `ops` are those of the fast network."""
    start = [parameter.detach().clone() for parameter in unet.parameters()]
    world = World(rank=0, size=1, device=subject.device)
    step = TrainStep(unet, config, SEED, world, text_encoder=None, ops=ops)
    loss, _ = step(iter([batch]), config.optimizer.warmup_steps)
    return [
        loss,
        *(p.detach().double() - w.double() for p, w in zip(unet.parameters(), start, strict=True)),
    ]


def _joined(values: list[Tensor]) -> list[Tensor]:
    """All changes, without the loss, as one tensor."""
    return [torch.cat([change.flatten() for change in values[1:]])]


def _trained_in(config: Config, dtype: str) -> Config:
    if dtype == "bfloat16":
        return config
    training = dataclasses.replace(config.training, precision="fp32")
    return dataclasses.replace(config, training=training, precision=PrecisionConfig())


def _exact_step(subject: Subject, config: Config, batch: Batch) -> list[Tensor]:
    """Loss and changes in float64, the draws apart, which are float32 by definition."""
    unet = subject.plain(torch.float64)
    start = [parameter.detach().float() for parameter in unet.parameters()]
    step = DiffusionStep(config.diffusion, SEED).to(subject.device)
    latents, noise, timesteps = step.draw(batch.moments, batch.sample_indices)
    noisy = step.schedule.add_noise(latents, noise, timesteps).double()
    target = step.schedule.v_target(latents, noise, timesteps).double()
    assert batch.context is not None
    loss = F.mse_loss(unet(noisy, timesteps, batch.context.double()), target)
    loss.backward()
    grads = [[parameter.grad for parameter in unet.parameters() if parameter.grad is not None]]
    rate = learning_rate(config.optimizer, config.learning_rate, config.optimizer.warmup_steps)
    return [loss.detach(), *_textbook(config, start, grads, rate)]


def _sampler(subject: Subject) -> Iterator[Row]:
    """DDIM against its formula (Song et al. 2021, equation 12 with eta 0), with a model that is a
    formula itself.

    As the benchmark samples, the last step ends at alphas_cumprod[0].
    """
    config, steps = subject.config.diffusion, min(subject.config.sampling.steps, 50)
    shape = 2, subject.config.model.in_channels, 4, 4
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).to(subject.device)
    text = torch.zeros(2, 1, 1, device=subject.device)
    seen: list[Tensor] = []

    def model(x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        seen.append(x)
        return _toy(x, timesteps[0].item())

    seen.append(ddim_sample(model, noise, text, text[:1], config, steps, guidance_scale=1.0))
    plain, truth = (
        _formula(noise.to(dtype), config, steps) for dtype in (torch.float32, torch.float64)
    )
    for name, part in (
        ("before its last step", slice(1, -1)),
        ("after its last step", slice(-1, None)),
    ):
        what = f"DDIM's latents {name}"
        yield compared(
            "step", what, subject.where, "float32", seen[part], [plain[part]], truth[part]
        )


def _toy(x: Tensor, timestep: float) -> Tensor:
    return (x * (0.3 + timestep / 2000)).sin()


def _formula(x: Tensor, config: Any, steps: int) -> list[Tensor]:
    """Latents before every step and after the last."""
    T = config.num_timesteps
    betas = (
        torch.linspace(config.beta_start**0.5, config.beta_end**0.5, T, dtype=torch.float64) ** 2
    )
    alphas = (1 - betas).cumprod(0).tolist()
    visited, latents = ddim_timesteps(T, steps), [x]
    for t, previous in zip(visited, [*visited[1:], 0], strict=True):
        alpha, v = alphas[t], _toy(x, t)
        predicted_x0 = alpha**0.5 * x - (1 - alpha) ** 0.5 * v
        predicted_noise = alpha**0.5 * v + (1 - alpha) ** 0.5 * x
        x = alphas[previous] ** 0.5 * predicted_x0 + (1 - alphas[previous]) ** 0.5 * predicted_noise
        latents.append(x)
    return latents
