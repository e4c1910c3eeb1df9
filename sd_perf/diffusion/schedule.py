"""The forward process: noise schedule, noising, target.

Ho et al. 2020 (arXiv 2006.11239), section 2: beta_t is the variance added at timestep t, and
alphas_cumprod_t (the paper's alpha bar) the product of 1 - beta up to t.

Shape letters: B samples, C channels, H and W latent rows and columns.
"""

from __future__ import annotations

import torch

from sd_perf.config import DiffusionConfig


def make_alphas_cumprod(config: DiffusionConfig) -> torch.Tensor:
    """Cumulative products of 1 - beta, (num_timesteps,) float64.

    The square roots of the betas are evenly spaced. This is "linear" in the LDM code base
    (`ldm/modules/diffusionmodules/util.py`) and "scaled_linear" in diffusers. The last value is
    0.00466 with the benchmark's betas: the terminal SNR is not zero.
    """
    start, end = config.beta_start**0.5, config.beta_end**0.5
    betas = torch.linspace(start, end, config.num_timesteps, dtype=torch.float64) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


class Schedule(torch.nn.Module):
    """Noising and targets, with sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod) in float32.

    The buffers move with the module and are not part of its state dict.
    """

    sqrt_alphas_cumprod: torch.Tensor
    sqrt_one_minus_alphas_cumprod: torch.Tensor

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.prediction = config.prediction
        alphas_cumprod = make_alphas_cumprod(config)
        # The roots are taken in float64 and rounded once.
        signal, sigma = alphas_cumprod.sqrt().float(), (1.0 - alphas_cumprod).sqrt().float()
        self.register_buffer("sqrt_alphas_cumprod", signal, persistent=False)
        self.register_buffer("sqrt_one_minus_alphas_cumprod", sigma, persistent=False)

    def _coefficients(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two roots at timesteps (B,), each (B, 1, 1, 1)."""
        shape = (-1, 1, 1, 1)
        signal = self.sqrt_alphas_cumprod[timesteps].view(shape)
        return signal, self.sqrt_one_minus_alphas_cumprod[timesteps].view(shape)

    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """x_t = sqrt(alphas_cumprod_t) latents + sqrt(1 - alphas_cumprod_t) noise, (B, C, H, W).

        Ho et al. 2020, equation 4. `timesteps` is (B,) int64.
        """
        signal, sigma = self._coefficients(timesteps)
        return signal * latents + sigma * noise

    def target(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """What the UNet is to predict, (B, C, H, W): v, or with epsilon the noise."""
        return noise if self.prediction == "epsilon" else self.v_target(latents, noise, timesteps)

    def v_target(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """v = sqrt(alphas_cumprod_t) noise - sqrt(1 - alphas_cumprod_t) latents, (B, C, H, W).

        Salimans & Ho 2022 (arXiv 2202.00512), section 4. `timesteps` is (B,) int64.
        """
        signal, sigma = self._coefficients(timesteps)
        return signal * noise - sigma * latents
