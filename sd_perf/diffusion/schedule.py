"""The forward process: noise schedule, noising, v-target.

Shape letters: B samples, C channels, H and W latent rows and columns.
"""

from __future__ import annotations

import torch

from sd_perf.config import DiffusionConfig


def make_alphas_cumprod(config: DiffusionConfig) -> torch.Tensor:
    """Cumulative products of 1 - beta, (num_timesteps,) float64.

    The roots of the betas are evenly spaced ("linear" in latent-diffusion, "scaled_linear" in
    diffusers; Rombach et al. 2022). There is no zero terminal SNR: the last value is 0.00466.
    """
    start, end = config.beta_start**0.5, config.beta_end**0.5
    betas = torch.linspace(start, end, config.num_timesteps, dtype=torch.float64) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


class Schedule(torch.nn.Module):
    """sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod) as float32 buffers."""

    sqrt_alphas_cumprod: torch.Tensor
    sqrt_one_minus_alphas_cumprod: torch.Tensor

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        alphas_cumprod = make_alphas_cumprod(config)
        for name, values in (("", alphas_cumprod), ("one_minus_", 1.0 - alphas_cumprod)):
            self.register_buffer(
                f"sqrt_{name}alphas_cumprod", values.sqrt().float(), persistent=False
            )

    def _coefficients(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shape = (-1, 1, 1, 1)
        signal = self.sqrt_alphas_cumprod[timesteps].view(shape)
        return signal, self.sqrt_one_minus_alphas_cumprod[timesteps].view(shape)

    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """x_t = sqrt(alphas_cumprod_t) latents + sqrt(1 - alphas_cumprod_t) noise; (B, C, H, W)."""
        signal, sigma = self._coefficients(timesteps)
        return signal * latents + sigma * noise

    def v_target(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """v = sqrt(alphas_cumprod_t) noise - sqrt(1 - alphas_cumprod_t) latents (Salimans & Ho
        2022, section 4)."""
        signal, sigma = self._coefficients(timesteps)
        return signal * noise - sigma * latents
