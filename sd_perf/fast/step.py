"""The diffusion step from fused operators: one makes the network's inputs, one the loss.

It computes what `reference.step.DiffusionStep` computes.

Shape letters: B samples, C latent channels, H and W latent rows and columns, T text tokens, D
context channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sd_perf.config import Config
from sd_perf.diffusion.randomness import Stream
from sd_perf.diffusion.schedule import Schedule
from sd_perf.fast.ops import Ops
from sd_perf.reference.step import offset_noise


class FusedDiffusionStep(torch.nn.Module):
    """`step(unet, moments, context, sample_indices) -> loss`; holds the schedule, no weights."""

    def __init__(self, config: Config, seed: int, ops: Ops) -> None:
        super().__init__()
        self.schedule = Schedule(config.diffusion, config.training.min_snr_gamma)
        self.config, self.seed = config.diffusion, seed
        self.diffusion_inputs, self.v_mse_loss = ops.diffusion_inputs, ops.v_mse_loss
        self.options = {
            "seed": seed,
            "latent_scale": config.diffusion.latent_scale,
            "timestep_stream": int(Stream.TIMESTEP),
            "noise_stream": int(Stream.NOISE),
            "moments_stream": int(Stream.MOMENTS),
            "prediction": config.diffusion.prediction,
            "dtype": torch.bfloat16 if config.training.precision == "bf16" else torch.float32,
        }

    def draw(self, moments: Tensor, sample_indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noisy latents and target (B, C, H, W), timesteps (B,) int64.

        moments is (B, 2C, H, W) float32, sample_indices (B,) int64. The noisy latents have the
        training precision's dtype.
        """
        alphas, sigmas = (
            self.schedule.sqrt_alphas_cumprod,
            self.schedule.sqrt_one_minus_alphas_cumprod,
        )
        tables = alphas, sigmas
        if self.config.offset_noise:
            return self._draw_with_offset(moments, sample_indices, tables)
        return self.diffusion_inputs(moments, sample_indices, *tables, **self.options)

    def _draw_with_offset(
        self, moments: Tensor, sample_indices: Tensor, tables: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`draw` with diffusion.offset_noise: noising and target are linear in the noise.

        The sums are of float32, so that noisy latents are rounded once.
        """
        options = {**self.options, "dtype": torch.float32}
        noisy, target, timesteps = self.diffusion_inputs(
            moments, sample_indices, *tables, **options
        )
        shift = offset_noise(self.config, self.seed, sample_indices, moments.shape[1] // 2)
        # What the shift alone adds to either: noising and target of no latents.
        zero = torch.zeros_like(shift)
        noisy = noisy + self.schedule.add_noise(zero, shift, timesteps)
        target = target + self.schedule.target(zero, shift, timesteps)
        return noisy.to(self.options["dtype"]), target, timesteps

    def forward(
        self, unet: torch.nn.Module, moments: Tensor, context: Tensor, sample_indices: Tensor
    ) -> Tensor:
        """Mean over the batch of the squared error of the prediction, a float32 scalar.

        context is (B, T, D); moments and sample_indices as in `draw`.
        """
        noisy, target, timesteps = self.draw(moments, sample_indices)
        predicted = unet(noisy, timesteps, context)
        return self.v_mse_loss(*self.schedule.weighed(predicted, target, timesteps))
