"""The diffusion step of the fast path: draws, latents, noising and target in one operator, the loss
in another."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sd_kernels.selection import Choice
from sd_perf.config import Config
from sd_perf.diffusion.randomness import Stream
from sd_perf.diffusion.schedule import Schedule


class FusedDiffusionStep(torch.nn.Module):
    """What `reference.step.DiffusionStep` computes: `step(unet, moments, context, sample_indices)
    -> loss`."""

    def __init__(self, config: Config, seed: int, choices: Mapping[str, Choice]) -> None:
        super().__init__()
        self.schedule = Schedule(config.diffusion)
        self.inputs = choices["diffusion_inputs"].function()
        self.loss = choices["v_mse_loss"].function()
        self.options = {
            "seed": seed,
            "latent_scale": config.diffusion.latent_scale,
            "timestep_stream": int(Stream.TIMESTEP),
            "noise_stream": int(Stream.NOISE),
            "moments_stream": int(Stream.MOMENTS),
            "dtype": torch.bfloat16 if config.training.precision == "bf16" else torch.float32,
        }

    def forward(
        self,
        unet: torch.nn.Module,
        moments: torch.Tensor,
        context: torch.Tensor,
        sample_indices: torch.Tensor,
    ) -> torch.Tensor:
        """Mean over the batch of the squared error of the v-prediction, a float32 scalar.

        moments (B, 2C, H, W) float32, context (B, T, D), sample_indices (B,) int64.
        """
        schedule = self.schedule
        tables = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
        noisy, target, timesteps = self.inputs(moments, sample_indices, *tables, **self.options)
        return self.loss(unet(noisy, timesteps, context), target)
