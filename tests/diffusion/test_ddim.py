"""DDIM: the benchmark's timesteps, agreement with diffusers' scheduler, an exact model."""

from __future__ import annotations

import torch
from diffusers.schedulers import DDIMScheduler

from sd_perf.config import DiffusionConfig
from sd_perf.diffusion.ddim import (
    ddim_sample,
    ddim_timesteps,
    guidance_context,
    guided_prediction,
)
from sd_perf.diffusion.schedule import Schedule, make_alphas_cumprod


def model(x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """A smooth stand-in for the UNet that depends on everything it is given."""
    return torch.tanh(
        x + context.mean((1, 2)).view(-1, 1, 1, 1) + timesteps.view(-1, 1, 1, 1) / 1000
    )


def test_timesteps():
    timesteps = ddim_timesteps(1000, 50)
    assert timesteps[0] == 981 and timesteps[-2:] == [21, 1] and len(timesteps) == 50
    assert max(ddim_timesteps(1000, 1000)) == 999


def test_timesteps_are_the_references_where_steps_divide():
    def reference(steps: int) -> list[int]:
        """LDM's make_ddim_timesteps, "uniform"."""
        return [t + 1 for t in range(0, 1000, 1000 // steps)][::-1]

    for steps in (1, 2, 4, 5, 8, 10, 20, 25, 40, 50, 100, 125, 200, 250, 500):
        assert ddim_timesteps(1000, steps) == reference(steps)
    assert (len(reference(12)), reference(12)[0]) == (13, 997)
    assert (len(ddim_timesteps(1000, 12)), ddim_timesteps(1000, 12)[0]) == (12, 914)


def test_equals_diffusers_scheduler():
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == ddim_timesteps(1000, 50)
    noise, context, uncond = torch.randn(3, 4, 8, 8), torch.randn(3, 5, 6), torch.randn(1, 5, 6)
    x = noise.double()
    for t in scheduler.timesteps:
        times = t.expand(3)
        v_uncond, v_cond = model(x, times, uncond), model(x, times, context)
        x = scheduler.step(v_uncond + 8.0 * (v_cond - v_uncond), t, x).prev_sample
    ours = ddim_sample(
        model, noise, context, uncond, DiffusionConfig(), steps=50, guidance_scale=8.0
    )
    # set_alpha_to_one=False is the benchmark's last step: it ends at alphas_cumprod[0].
    torch.testing.assert_close(ours.double(), x, rtol=1e-4, atol=1e-4)


def test_last_step_ends_at_the_first_alphas_cumprod():
    """A model that knows the latents exactly ends at x_0 noised to timestep 0, not at x_0."""
    config = DiffusionConfig()
    schedule, latents, noise = Schedule(config), torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4)

    def exact(x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        return schedule.v_target(latents, noise, timesteps)

    first = torch.full((2,), 981)
    context = torch.zeros(2, 1, 1)
    end = ddim_sample(
        exact, schedule.add_noise(latents, noise, first), context, context[:1], config, 50, 1.0
    )
    start = make_alphas_cumprod(config)[0]
    torch.testing.assert_close(
        end, (start.sqrt() * latents + (1 - start).sqrt() * noise).float(), atol=1e-5, rtol=0
    )


def test_guidance_scale_one_is_the_conditional_prediction():
    x, timesteps = torch.randn(2, 4, 4, 4), torch.tensor([7, 7])
    context, uncond = torch.randn(2, 3, 4), torch.randn(1, 3, 4)
    plain, almost = (
        guided_prediction(model, x, timesteps, guidance_context(context, uncond, scale), scale)
        for scale in (1.0, 1.0 + 1e-7)
    )
    torch.testing.assert_close(plain, almost, atol=1e-5, rtol=0)
