"""The diffusion training step: draws, noising, prediction, loss.

Rombach et al. 2022 (arXiv 2112.10752), equation 3, where the UNet predicts the noise; by default it
is the v-target of Salimans & Ho 2022 (arXiv 2202.00512, section 4) in place of it. It is the oracle
that the fast step is held to.

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
    """Draw latents (B, C, H, W) from the autoencoder's posterior: latent_scale (mean + std noise).

    `moments` is (B, 2C, H, W) float32, mean then log-variance; `noise` is (B, C, H, W) standard
    normal. The log-variance is clamped to [-30, 20], as in the LDM code base
    (`ldm/modules/distributions/distributions.py`). The scale gives latents unit variance (Rombach
    et al. 2022, appendix G).
    """
    mean, logvar = moments.chunk(2, dim=1)
    std = torch.exp(0.5 * logvar.clamp(-30.0, 20.0))
    return latent_scale * (mean + std * noise)


def offset_noise(
    config: DiffusionConfig, seed: int, sample_indices: torch.Tensor, channels: int
) -> torch.Tensor:
    """Noise (B, C, 1, 1) float32 that shifts the mean of a sample's channels.

    diffusion.offset_noise x a standard normal (Guttenberg, "Diffusion with Offset Noise", 2023).
    """
    shifts = normal(seed, Stream.OFFSET, sample_indices, channels)
    return config.offset_noise * shifts[:, :, None, None]


class DiffusionStep(torch.nn.Module):
    """The loss of one micro-batch. Holds the noise schedule and no weights.

    Every draw is keyed by (seed, sample index, stream), so the loss of a sample does not depend on
    the rank or the batch that it is in.
    """

    def __init__(self, config: DiffusionConfig, seed: int, min_snr_gamma: float = 0.0) -> None:
        """`min_snr_gamma` is that of the config's section training."""
        super().__init__()
        self.config = config
        self.seed = seed
        self.schedule = Schedule(config, min_snr_gamma)

    def draw(self, moments: torch.Tensor, sample_indices: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Latents and noise, (B, C, H, W) float32, and timesteps (B,) int64 of the samples.

        `moments` is (B, 2C, H, W) float32, `sample_indices` (B,) int64.
        """
        batch, double_channels, height, width = moments.shape
        channels = double_channels // 2
        shape, num = (batch, channels, height, width), channels * height * width
        posterior_noise = normal(self.seed, Stream.MOMENTS, sample_indices, num).view(shape)
        noise = normal(self.seed, Stream.NOISE, sample_indices, num).view(shape)
        if self.config.offset_noise:
            noise = noise + offset_noise(self.config, self.seed, sample_indices, channels)
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
        """Mean squared error of the prediction over all elements of the batch, a float32 scalar.

        With min-SNR weighting each sample's squared error is times its timestep's weight.

        `moments` is (B, 2C, H, W) float32, `context` (B, T, D), `sample_indices` (B,) int64.
        """
        latents, noise, timesteps = self.draw(moments, sample_indices)
        noisy = self.schedule.add_noise(latents, noise, timesteps)
        target = self.schedule.target(latents, noise, timesteps)
        prediction = unet(noisy, timesteps, context)
        return F.mse_loss(*self.schedule.weighed(prediction.float(), target, timesteps))
