"""The diffusion training step as the paper has it: draws, noising, prediction, loss.

Shape letters: B samples, C latent channels, H and W latent rows and columns, T text tokens, D
context channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sd_perf.config import DiffusionConfig
from sd_perf.diffusion.randomness import Stream, normal, uniform_integers
from sd_perf.diffusion.schedule import Schedule


def sample_latents(moments: torch.Tensor, noise: torch.Tensor, latent_scale: float) -> torch.Tensor:
    """Latents (B, C, H, W) from the autoencoder's posterior: latent_scale x (mean + std x noise).

    `moments` is (B, 2C, H, W) float32, mean then log-variance; the log-variance is clamped to [-30,
    20].
    """
    mean, logvar = moments.chunk(2, dim=1)
    std = torch.exp(0.5 * logvar.clamp(-30.0, 20.0))
    return latent_scale * (mean + std * noise)


class DiffusionStep(torch.nn.Module):
    """`step(unet, moments, context, sample_indices) -> loss`; holds the schedule, no weights.

    Every draw is keyed by (seed, sample index, stream), so the loss of a sample is the same on any
    rank.
    """

    def __init__(self, config: DiffusionConfig, seed: int) -> None:
        super().__init__()
        self.config = config
        self.seed = seed
        self.schedule = Schedule(config)

    def draw(self, moments: torch.Tensor, sample_indices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Latents, noise (B, C, H, W) float32 and timesteps (B,) int64 of the samples."""
        batch, channels, height, width = moments.shape[0], moments.shape[1] // 2, *moments.shape[2:]
        shape, num = (batch, channels, height, width), channels * height * width
        posterior_noise = normal(self.seed, Stream.MOMENTS, sample_indices, num).view(shape)
        noise = normal(self.seed, Stream.NOISE, sample_indices, num).view(shape)
        timesteps = uniform_integers(
            self.seed, Stream.TIMESTEP, sample_indices, self.config.num_timesteps
        )
        return sample_latents(moments, posterior_noise, self.config.latent_scale), noise, timesteps

    def forward(
        self,
        unet: torch.nn.Module,
        moments: torch.Tensor,
        context: torch.Tensor,
        sample_indices: torch.Tensor,
    ) -> torch.Tensor:
        """Mean over the batch of the squared error of the v-prediction, a float32 scalar."""
        latents, noise, timesteps = self.draw(moments, sample_indices)
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        target = self.schedule.v_target(latents, noise, timesteps)
        prediction = unet(noisy, timesteps, context)
        return F.mse_loss(prediction.float(), target)
