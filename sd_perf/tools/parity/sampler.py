"""Level step, its sampler: the latents of DDIM against the formula.

Shape letters: B samples, C latent channels, H and W rows and columns.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sd_perf.config import DiffusionConfig
from sd_perf.diffusion.ddim import ddim_sample, ddim_timesteps, trailing_timesteps
from sd_perf.diffusion.schedule import with_zero_terminal_snr
from sd_perf.tools.parity.comparison import Comparison
from sd_perf.tools.parity.parity_case import SEED, ParityCase

MOST_STEPS = 50


def compare_sampler(case: ParityCase) -> Iterator[Comparison]:
    """Compare the latents that `ddim_sample` gives its model, and its result, with the formula.

    The model is a formula itself, so that only the sampler can be wrong. The last step has a line
    of its own: as the benchmark samples, it ends at alphas_cumprod[0], not at 1.
    """
    config, steps = case.config.diffusion, min(case.config.sampling.steps, MOST_STEPS)
    shape = 2, case.config.model.in_channels, 4, 4
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).to(case.device)
    text = torch.zeros(2, 1, 1, device=case.device)
    latents: list[Tensor] = []

    def model(x: Tensor, timesteps: Tensor, context: Tensor | list[Tensor]) -> Tensor:
        latents.append(x.clone())  # the sampler writes the next latents over them
        return _toy_prediction(x, timesteps[0].item())

    latents.append(ddim_sample(model, noise, text, text[:1], config, steps, guidance_scale=1.0))
    plain, truth = (
        _ddim_latents(noise.to(dtype), config, steps) for dtype in (torch.float32, torch.float64)
    )
    comparer = case.comparer("step", "float32")
    for name, part in (
        ("before its last step", slice(1, -1)),
        ("after its last step", slice(-1, None)),
    ):
        yield comparer.tensors(
            f"DDIM's latents {name}",
            fast=latents[part],
            torch_results=[plain[part]],
            truth=truth[part],
        )


def _toy_prediction(x: Tensor, timestep: float) -> Tensor:
    return (x * (0.3 + timestep / 2000)).sin()


def _ddim_latents(x: Tensor, config: DiffusionConfig, steps: int) -> list[Tensor]:
    """Latents (B, C, H, W) before every step and after the last, in the dtype of x.

    Song et al. 2021, equation 12 with eta 0: x_prev = sqrt(a_prev) x0 + sqrt(1 - a_prev) noise.
    Predictions are v (Salimans & Ho 2022): x0 = sqrt(a) x - sqrt(1 - a) v and
    noise = sqrt(a) v + sqrt(1 - a) x; or the noise itself, and
    x0 = (x - sqrt(1 - a) noise) / sqrt(a).
    """
    T = config.num_timesteps
    betas = (
        torch.linspace(config.beta_start**0.5, config.beta_end**0.5, T, dtype=torch.float64) ** 2
    )
    product, spaced = (1 - betas).cumprod(0), ddim_timesteps
    if config.zero_terminal_snr:
        product, spaced = with_zero_terminal_snr(product), trailing_timesteps
    alphas, timesteps, latents = product.tolist(), spaced(T, steps), [x]
    for t, previous in zip(timesteps, [*timesteps[1:], 0], strict=True):
        alpha, v = alphas[t], _toy_prediction(x, t)
        x0 = alpha**0.5 * x - (1 - alpha) ** 0.5 * v
        noise = alpha**0.5 * v + (1 - alpha) ** 0.5 * x
        if config.prediction == "epsilon":
            noise = _toy_prediction(x, t)
            x0 = (x - (1 - alpha) ** 0.5 * noise) / alpha**0.5
        x = alphas[previous] ** 0.5 * x0 + (1 - alphas[previous]) ** 0.5 * noise
        latents.append(x)
    return latents
