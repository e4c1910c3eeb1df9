"""The sampler: same as `ddim_sample`, one recorded step for each batch size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from sd_perf.config import Config, SamplingConfig
from sd_perf.diffusion.ddim import ddim_sample, ddim_timesteps
from sd_perf.diffusion.schedule import make_alphas_cumprod
from sd_perf.evaluation import sampler as sampler_module
from sd_perf.evaluation.sampler import Sampler
from sd_perf.fast.graph import WARM_UP_PASSES, Runner

CONFIG = replace(Config(), sampling=SamplingConfig(steps=5, guidance_scale=3.0))


def unet(x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
    """A smooth stand-in that depends on everything it is given."""
    return torch.sin(x + context.mean((1, 2))[:, None, None, None] + timesteps.view(-1, 1, 1, 1))


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    shapes = (size, 4, 4, 4), (size, 3, 2), (1, 3, 2)
    noise, context, uncond = (torch.randn(shape, generator=generator) for shape in shapes)
    return noise, context, uncond


def by_plain_numbers(
    noise: torch.Tensor, context: torch.Tensor, uncond: torch.Tensor
) -> torch.Tensor:
    """Latents with each step's timestep and coefficients from the host."""
    alphas, x = make_alphas_cumprod(CONFIG.diffusion).tolist(), noise
    timesteps = ddim_timesteps(1000, 5)
    for t, t_next in zip(timesteps, [*timesteps[1:], 0], strict=True):
        times = torch.full((2 * len(x),), t)
        both = unet(torch.cat((x, x)), times, torch.cat((uncond.expand_as(context), context)))
        v_uncond, v_cond = both.chunk(2)
        v = v_uncond + 3.0 * (v_cond - v_uncond)
        x_start = alphas[t] ** 0.5 * x - (1 - alphas[t]) ** 0.5 * v
        predicted_noise = alphas[t] ** 0.5 * v + (1 - alphas[t]) ** 0.5 * x
        x = alphas[t_next] ** 0.5 * x_start + (1 - alphas[t_next]) ** 0.5 * predicted_noise
    return x


def test_latents_are_those_of_plain_numbers_to_the_last_bit():
    sampler = Sampler(unet, CONFIG)
    # In turns, so that nothing of the batch before is left.
    for size in (3, 2, 3, 1):
        inputs = batch(size)
        latents = sampler(*inputs)
        assert torch.equal(latents, by_plain_numbers(*inputs))
        assert torch.equal(latents, ddim_sample(unet, *inputs, CONFIG.diffusion, 5, 3.0))


def test_a_result_stays_when_the_next_is_drawn():
    sampler = Sampler(unet, CONFIG)
    noise, context, uncond = batch(2)
    first = sampler(noise, context, uncond)
    kept = first.clone()
    sampler(-noise, context, uncond)
    assert torch.equal(first, kept)


class Recorder(Runner):
    """A runner that says what it does and, having no GPU, calls instead of replaying."""

    log: list[str]

    def warm_up(self, rehearse) -> None:
        self.log.append("warm-up")
        rehearse()

    def capture(self) -> None:
        self.log.append("capture")

    def run(self) -> None:
        self.log.append("run")
        super().run()


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    @property
    def device(self):
        return torch.device("cuda")


@pytest.mark.parametrize(("cuda_graph", "recorded"), [("auto", True), ("off", False)])
def test_a_step_is_recorded_once_for_each_batch_size(monkeypatch, cuda_graph, recorded):
    log: list[str] = []
    monkeypatch.setattr(Recorder, "log", log, raising=False)
    monkeypatch.setattr(sampler_module, "Runner", Recorder)
    config = replace(CONFIG, training=replace(CONFIG.training, cuda_graph=cuda_graph))
    sampler, make = Sampler(unet, config), sampler_module.Sampler._runner
    monkeypatch.setattr(
        Sampler, "_runner", lambda self, d, noise, c: make(self, d, noise.as_subclass(OnGpu), c)
    )
    for size in (2, 1, 2):
        inputs = batch(size)
        # What the warm-up drew leaves no trace.
        assert torch.equal(sampler(*inputs), by_plain_numbers(*inputs))
    once = ["warm-up", "capture"] if recorded else []
    assert log == [*once, *["run"] * 5, *once, *["run"] * 5, *["run"] * 5]
    assert WARM_UP_PASSES > 1
