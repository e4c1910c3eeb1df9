"""min-SNR weighting, offset noise and zero terminal SNR, against their papers and diffusers."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from diffusers.schedulers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

from sd_kernels.spec import Target
from sd_perf.config import Config, DiffusionConfig, TrainingConfig
from sd_perf.diffusion.ddim import ddim_sample, trailing_timesteps
from sd_perf.diffusion.randomness import Stream, normal
from sd_perf.diffusion.schedule import (
    Schedule,
    make_alphas_cumprod,
    min_snr_weights,
    with_zero_terminal_snr,
)
from sd_perf.fast.choice import choose_kernels
from sd_perf.fast.ops import Ops
from sd_perf.fast.step import FusedDiffusionStep
from sd_perf.models.key_maps import scheduler_config
from sd_perf.models.torchvision_schemas import define_missing_torchvision_ops
from sd_perf.reference.step import DiffusionStep

ALPHAS = make_alphas_cumprod(DiffusionConfig())
ZERO = DiffusionConfig(zero_terminal_snr=True)
INDICES = torch.arange(40, 48)
MOMENTS = normal(99, Stream.SYNTHETIC, INDICES, 8 * 36).view(-1, 8, 6, 6)
CONTEXT = torch.zeros(8, 2, 3)


def model(x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x + timesteps.view(-1, 1, 1, 1) / 1000)


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_diffusers(gamma):
    define_missing_torchvision_ops()
    from diffusers.training_utils import compute_snr

    timesteps = torch.arange(1000)
    snr = compute_snr(SimpleNamespace(alphas_cumprod=ALPHAS), timesteps).double()
    # As in diffusers' examples/text_to_image/train_text_to_image.py, from Hang et al.'s 3.4.
    clamped = snr.clamp(max=gamma)
    for prediction, right in {"v": clamped / (snr + 1), "epsilon": clamped / snr}.items():
        ours = min_snr_weights(ALPHAS, gamma, prediction)
        torch.testing.assert_close(ours, right, rtol=1e-4, atol=0)


def test_zero_terminal_snr_is_diffusers():
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    right = torch.cumprod(1 - rescale_zero_terminal_snr(betas), dim=0)
    ours = with_zero_terminal_snr(ALPHAS)
    torch.testing.assert_close(ours, right, rtol=1e-9, atol=1e-12)
    assert ours[-1] == 0 and ours[0] == pytest.approx(ALPHAS[0].item(), rel=1e-12)
    assert torch.equal(make_alphas_cumprod(ZERO), ours)
    weights = min_snr_weights(ours, 5.0, "v")
    assert weights.isfinite().all() and weights[-1] == 0
    schedule, x = Schedule(ZERO), torch.randn(2, 1, 4, 3, 3)
    last = torch.tensor([999])
    assert torch.equal(schedule.add_noise(*x, last), x[1])
    assert torch.equal(schedule.v_target(*x, last), -x[0])


@pytest.mark.parametrize("steps", [10, 50])
def test_pictures_of_zero_terminal_snr_are_diffusers(steps):
    scheduler = DDIMScheduler.from_config(scheduler_config(ZERO))
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == trailing_timesteps(1000, steps)
    noise, context = torch.randn(2, 4, 6, 6), torch.zeros(2, 2, 3)
    x = noise
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(2), context), t, x).prev_sample
    ours = ddim_sample(model, noise, context, context[:1], ZERO, steps, guidance_scale=1.0)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)


def test_offset_noise_is_one_number_per_sample_and_channel():
    plain = DiffusionStep(DiffusionConfig(), seed=5)
    offset = DiffusionStep(DiffusionConfig(offset_noise=0.1), seed=5)
    (latents, noise, timesteps), shifted = (step.draw(MOMENTS, INDICES) for step in (plain, offset))
    assert torch.equal(shifted[0], latents) and torch.equal(shifted[2], timesteps)
    shifts = normal(5, Stream.OFFSET, INDICES, 4)
    torch.testing.assert_close(shifted[1] - noise, (0.1 * shifts)[..., None, None].expand_as(noise))
    part = offset.draw(MOMENTS[1::3], INDICES[1::3])
    assert torch.equal(part[1], shifted[1][1::3])


def test_weighed_loss_is_the_formula():
    config, gamma = DiffusionConfig(), 5.0
    step = DiffusionStep(config, 5, gamma)
    latents, noise, timesteps = step.draw(MOMENTS, INDICES)
    noisy = step.schedule.add_noise(latents, noise, timesteps)
    target = step.schedule.v_target(latents, noise, timesteps)
    errors = (model(noisy, timesteps, CONTEXT) - target).square().double().mean((1, 2, 3))
    snr = ALPHAS / (1 - ALPHAS)
    right = (errors * (snr.clamp(max=gamma) / (snr + 1))[timesteps]).mean().item()
    assert step(model, MOMENTS, CONTEXT, INDICES).item() == pytest.approx(right, rel=1e-5)


@pytest.mark.parametrize(
    ("diffusion", "gamma"),
    [
        ({"offset_noise": 0.1}, 0.0),
        ({"prediction": "epsilon", "offset_noise": 0.1}, 5.0),
        (vars(ZERO) | {"offset_noise": 0.05}, 1.0),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_fast_step_computes_what_the_plain_one_does(diffusion, gamma, precision):
    config = dataclasses.replace(
        Config(),
        diffusion=DiffusionConfig(**diffusion),
        training=TrainingConfig(min_snr_gamma=gamma, precision=precision),
    )
    ops = Ops.chosen(choose_kernels(config, Target.here()))
    fast = FusedDiffusionStep(config, 5, ops)
    plain = DiffusionStep(config.diffusion, 5, gamma)
    latents, noise, timesteps = plain.draw(MOMENTS, INDICES)
    noisy, target, drawn = fast.draw(MOMENTS, INDICES)
    assert torch.equal(drawn, timesteps)
    right = plain.schedule.add_noise(latents, noise, timesteps)
    is_exact = precision == "fp32"
    assert noisy.dtype == (torch.float32 if is_exact else torch.bfloat16)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if is_exact else {"rtol": 2**-8, "atol": 1e-5}
    torch.testing.assert_close(noisy.float(), right, **tolerance)
    right = plain.schedule.target(latents, noise, timesteps)
    torch.testing.assert_close(target, right, rtol=1e-5, atol=1e-5)
    losses = [step(model, MOMENTS, CONTEXT, INDICES).item() for step in (fast, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if is_exact else 1e-2)
