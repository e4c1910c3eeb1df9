"""v and epsilon: targets, training steps and sampling, with diffusers' schedulers as the judges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers.schedulers import DDIMScheduler, DDPMScheduler

from sd_perf.config import Config, DiffusionConfig
from sd_perf.diffusion.ddim import ddim_sample, split_prediction
from sd_perf.diffusion.schedule import Schedule, make_alphas_cumprod
from sd_perf.fast.ops import Ops
from sd_perf.fast.step import FusedDiffusionStep
from sd_perf.models.build import choose_ops
from sd_perf.models.key_maps import scheduler_config
from sd_perf.reference.step import DiffusionStep
from sd_perf.tools.parity.sampler import _ddim_latents

BOTH = pytest.mark.parametrize("prediction", ["v", "epsilon"])
TIMESTEPS = torch.tensor([0, 17, 500, 999])


def theirs(kind, prediction):
    return kind.from_config(scheduler_config(DiffusionConfig(prediction=prediction)))


def latents_and_noise():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 4, 4, 4, generator=generator).unbind()


@BOTH
def test_targets_are_those_of_the_ddpm_scheduler(prediction):
    latents, noise = latents_and_noise()
    schedule = Schedule(DiffusionConfig(prediction=prediction))
    scheduler = theirs(DDPMScheduler, prediction)
    target = {"v": scheduler.get_velocity(latents, noise, TIMESTEPS), "epsilon": noise}[prediction]
    close = {"rtol": 1e-4, "atol": 1e-5}  # diffusers multiplies its alphas in float32
    torch.testing.assert_close(schedule.target(latents, noise, TIMESTEPS), target, **close)
    noisy = scheduler.add_noise(latents, noise, TIMESTEPS)
    torch.testing.assert_close(schedule.add_noise(latents, noise, TIMESTEPS), noisy, **close)


@BOTH
@pytest.mark.parametrize("timestep", [1, 501, 981])
def test_one_step_is_that_of_the_schedulers(prediction, timestep):
    x, predicted = latents_and_noise()
    alphas = make_alphas_cumprod(DiffusionConfig()).tolist()
    x_start, noise = split_prediction(x, predicted, alphas[timestep], prediction)
    ddim = theirs(DDIMScheduler, prediction)
    ddim.set_timesteps(50)
    step = ddim.step(predicted, timestep, x)
    alpha = alphas[max(timestep - 20, 0)]
    after = alpha**0.5 * x_start + (1 - alpha) ** 0.5 * noise
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(step.pred_original_sample, x_start, **close)
    torch.testing.assert_close(step.prev_sample, after, **close)
    ddpm = theirs(DDPMScheduler, prediction).step(predicted, timestep, x)
    torch.testing.assert_close(ddpm.pred_original_sample, x_start, **close)


@BOTH
def test_sampling_is_that_of_the_ddim_scheduler(prediction):
    """And of the formula that `sd-perf parity` has."""

    def model(x, timesteps, _):
        return (x * (0.3 + timesteps.view(-1, 1, 1, 1) / 2000)).sin()

    x, _ = noise, none = latents_and_noise()[0], torch.zeros(1, 1, 1)
    scheduler, config = theirs(DDIMScheduler, prediction), DiffusionConfig(prediction=prediction)
    scheduler.set_timesteps(10)
    for timestep in scheduler.timesteps:
        x = scheduler.step(model(x, timestep, none), timestep, x).prev_sample
    ours = ddim_sample(model, noise, none, none, config, steps=10, guidance_scale=1.0)
    torch.testing.assert_close(ours, x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours, _ddim_latents(noise, config, 10)[-1], rtol=1e-5, atol=1e-5)


def test_the_fast_step_has_the_loss_of_the_plain_one():
    losses = []
    for prediction in ("v", "epsilon"):
        config = Config()
        config = replace(
            config,
            model=replace(config.model, implementation="fast"),
            diffusion=DiffusionConfig(prediction=prediction),
            training=replace(config.training, precision="fp32"),
        )
        ops = choose_ops(config)
        assert isinstance(ops, Ops)
        moments, context = torch.randn(3, 8, 8, 8), torch.zeros(3, 1, 1)
        samples = moments, context, torch.tensor([5, 6, 7])
        unet = torch.nn.Module()
        unet.forward = lambda noisy, timesteps, context: 0.5 * noisy  # type: ignore[method-assign]
        plain = DiffusionStep(config.diffusion, seed=3)(unet, *samples)
        fast = FusedDiffusionStep(config, 3, ops)(unet, *samples)
        torch.testing.assert_close(fast, plain)
        losses.append(plain.item())
    assert losses[0] != pytest.approx(losses[1], rel=0.01)
