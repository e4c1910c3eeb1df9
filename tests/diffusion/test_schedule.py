"""The noise schedule against published values, and the algebra of noising and v."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sd_perf.config import DiffusionConfig
from sd_perf.diffusion.schedule import Schedule, make_alphas_cumprod

# sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod) at 0 and 999, published with an independent
# implementation that accumulates the product in float32.
GOLDEN = (0.9995748997, 0.0682648495, 0.0291551333, 0.9976672530)


def ends(schedule: Schedule) -> list[float]:
    tables = (schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod)
    return [table[i].item() for table in tables for i in (0, 999)]


def test_golden_values():
    # Ours accumulates in float64: 1 - 0.99915 loses five digits in float32, hence 2e-5.
    assert ends(Schedule(DiffusionConfig())) == pytest.approx(GOLDEN, rel=2e-5)


def test_golden_values_are_float32_arithmetic_of_the_same_betas():
    betas = (
        (torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).float().numpy()
    )
    product = np.cumprod(1 - betas)
    float32 = [
        np.sqrt(product[0]),
        np.sqrt(product[-1]),
        np.sqrt(1 - product[0]),
        np.sqrt(1 - product[-1]),
    ]
    assert [float(value) for value in float32] == pytest.approx(GOLDEN, abs=1e-10)


def test_first_and_last_alphas_cumprod():
    alphas_cumprod = make_alphas_cumprod(DiffusionConfig())
    assert alphas_cumprod.dtype == torch.float64
    assert alphas_cumprod[0].item() == pytest.approx(1 - 0.00085, abs=1e-12)
    assert alphas_cumprod[-1].item() == pytest.approx(0.0046600985, rel=1e-7)


def test_noising_and_v_are_a_rotation():
    schedule = Schedule(DiffusionConfig())
    latents, noise = torch.randn(4, 4, 3, 5), torch.randn(4, 4, 3, 5)
    timesteps = torch.tensor([0, 1, 500, 999])
    x, v = (
        schedule.add_noise(latents, noise, timesteps),
        schedule.v_target(latents, noise, timesteps),
    )
    signal = schedule.sqrt_alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    sigma = schedule.sqrt_one_minus_alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    torch.testing.assert_close(signal * x - sigma * v, latents, atol=1e-5, rtol=0)
    torch.testing.assert_close(sigma * x + signal * v, noise, atol=1e-5, rtol=0)
