"""The rival of the CPU figures: a training step made of diffusers' UNet and torch's fused AdamW.

    python -m benchmarks.diffusers_training [--steps 1]

It is what a training script of diffusers does for v-prediction on cached moments: sample latents,
draw noise and timesteps, DDPMScheduler's noisy latents and velocity, mean squared error, backward,
AdamW. Network, batch and inputs have the sizes of configs/smoke.yaml. Needs diffusers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F

from benchmarks.command import command_parser
from sd_perf.config import Config, UNetConfig
from sd_perf.models.key_maps import diffusers_unet_config
from sd_perf.models.torchvision_schemas import define_missing_torchvision_ops


def comparable(config: Config) -> UNetConfig:
    """The config's network as stock diffusers can have it: one number of groups for all norms."""
    return replace(config.model.network, resblock_groups=config.model.transformer_groups)


def build(network: UNetConfig) -> torch.nn.Module:
    """diffusers' UNet of this config, with random weights."""
    define_missing_torchvision_ops()
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return UNet2DConditionModel.from_config(diffusers_unet_config(network))


def training_step(
    config: Config, moments: torch.Tensor, context: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """A call that takes one optimizer step on moments (B, 2C, S, S) and context (B, L, D).

    The call returns the loss.
    """
    unet = build(comparable(config))
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    steps, options = config.diffusion, config.optimizer
    scheduler = DDPMScheduler(
        num_train_timesteps=steps.num_timesteps,
        beta_start=steps.beta_start,
        beta_end=steps.beta_end,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
    )
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=config.learning_rate,
        betas=(options.beta_1, options.beta_2),
        eps=options.epsilon,
        weight_decay=options.weight_decay,
        fused=True,
    )

    def step() -> torch.Tensor:
        mean, log_variance = moments.chunk(2, dim=1)
        deviation = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
        latents = (mean + deviation * torch.randn_like(mean)) * steps.latent_scale
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, steps.num_timesteps, (len(latents),))
        noisy = scheduler.add_noise(latents, noise, timesteps)
        target = scheduler.get_velocity(latents, noise, timesteps)
        predicted = unet(noisy, timesteps, context, return_dict=False)[0]
        loss = F.mse_loss(predicted.float(), target.float())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def main(arguments: Sequence[str] | None = None) -> int:
    """Take steps on random inputs and print the last loss; returns the exit code."""
    from benchmarks.training_run import preset

    parser = command_parser("diffusers_training", __doc__)
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps (default: 1)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    config = preset("smoke.yaml")
    batch, data, model = config.training.global_batch_size, config.data, config.model
    moments = torch.randn(batch, 2 * model.in_channels, data.latent_size, data.latent_size)
    step = training_step(
        config, moments, torch.randn(batch, data.context_tokens, model.context_dim)
    )
    losses = [step().item() for _ in range(options.steps)]
    print(f"loss {losses[-1]:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
