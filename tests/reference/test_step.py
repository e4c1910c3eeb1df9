"""The training step against its formulas, and its independence of the split."""

from __future__ import annotations

import math

import pytest
import torch

from sd_perf.config import DiffusionConfig
from sd_perf.diffusion.randomness import Stream, normal, uniform_integers
from sd_perf.diffusion.schedule import make_alphas_cumprod
from sd_perf.reference.step import DiffusionStep, sample_latents


class ScaledInput(torch.nn.Module):
    """v = weight x_t: the smallest network whose loss can be written down."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.7))

    def forward(
        self, x: torch.Tensor, timesteps: torch.Tensor, context: torch.Tensor
    ) -> torch.Tensor:
        return self.weight * x


def make_batch(indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    moments = normal(99, Stream.SYNTHETIC, indices, 8 * 6 * 6).view(-1, 8, 6, 6)
    return moments, torch.zeros(len(indices), 2, 3)


def test_loss_and_gradient_are_the_formulas():
    indices = torch.arange(40, 45)
    moments, context = make_batch(indices)
    network = ScaledInput()
    loss = DiffusionStep(DiffusionConfig(), seed=5)(network, moments, context, indices)
    loss.backward()

    alphas_cumprod = make_alphas_cumprod(DiffusionConfig())
    noise = normal(5, Stream.NOISE, indices, 144).view(5, 4, 6, 6).double()
    posterior = normal(5, Stream.MOMENTS, indices, 144).view(5, 4, 6, 6).double()
    t = uniform_integers(5, Stream.TIMESTEP, indices, 1000)
    signal, sigma = (
        alphas_cumprod[t].sqrt().view(-1, 1, 1, 1),
        (1 - alphas_cumprod[t]).sqrt().view(-1, 1, 1, 1),
    )
    z = 0.18215 * (moments[:, :4].double() + torch.exp(moments[:, 4:].double() / 2) * posterior)
    x, v = signal * z + sigma * noise, signal * noise - sigma * z
    assert loss.item() == pytest.approx((0.7 * x - v).square().mean().item(), rel=1e-6)
    expected = (2 * (0.7 * x - v) * x).mean().item()
    assert network.weight.grad is not None and network.weight.grad.item() == pytest.approx(
        expected, rel=1e-5
    )


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_draw_is_independent_of_world_size(world_size):
    indices = torch.arange(60, 72)
    moments, _ = make_batch(indices)
    step = DiffusionStep(DiffusionConfig(), seed=5)
    whole = step.draw(moments, indices)
    for rank in range(world_size):
        part = step.draw(moments[rank::world_size], indices[rank::world_size])
        for ours, all_of_it in zip(part, whole, strict=True):
            assert torch.equal(ours, all_of_it[rank::world_size])


def test_log_variance_is_clamped():
    moments = torch.zeros(1, 8, 1, 1)
    moments[:, 4:] = torch.tensor([-1e9, -30.0, 20.0, 1e9]).view(1, 4, 1, 1)
    latents = sample_latents(moments, torch.ones(1, 4, 1, 1), 1.0).flatten()
    assert latents[0] == latents[1] == pytest.approx(math.exp(-15)) and latents[2] == latents[3]
