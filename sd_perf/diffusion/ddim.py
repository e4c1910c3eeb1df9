"""DDIM sampling of a v-prediction model with classifier-free guidance, eta 0.

Song et al. 2021 (DDIM), Salimans & Ho 2022 (v), Ho & Salimans 2022 (guidance). As the benchmark
samples: timesteps 1, 1 + stride, ... with stride num_timesteps // steps, and a last step that ends
at alphas_cumprod[0], not at 1.

Shape letters: B samples, C channels, H and W latent rows and columns, T text tokens, D context
channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sd_perf.config import DiffusionConfig
from sd_perf.diffusion.schedule import make_alphas_cumprod

Predictor = Callable[[torch.Tensor, torch.Tensor, Any], torch.Tensor]


def ddim_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """Timesteps in visiting order: 981, 961, ..., 1 for 50 of 1000."""
    stride = num_timesteps // steps
    return [min(1 + stride * i, num_timesteps - 1) for i in reversed(range(steps))]


def guidance_text(
    context: torch.Tensor, uncond: torch.Tensor, guidance_scale: float
) -> torch.Tensor:
    """What a guided prediction conditions on: [uncond, context] (2B, T, D), or without guidance
    context (B, T, D)."""
    return context if guidance_scale == 1.0 else torch.cat((uncond.expand_as(context), context))


def guided_prediction(
    unet: Predictor, x: torch.Tensor, timesteps: torch.Tensor, text: Any, guidance_scale: float
) -> torch.Tensor:
    """v_uncond + guidance_scale (v_cond - v_uncond), one UNet call on `guidance_text`; float32."""
    if guidance_scale == 1.0:
        return unet(x, timesteps, text).float()
    v_uncond, v_cond = (
        unet(torch.cat((x, x)), torch.cat((timesteps, timesteps)), text).float().chunk(2)
    )
    return v_uncond + guidance_scale * (v_cond - v_uncond)


@torch.no_grad()
def ddim_sample(
    unet: Predictor,
    noise: torch.Tensor,
    context: torch.Tensor,
    uncond: torch.Tensor,
    config: DiffusionConfig,
    steps: int = 50,
    guidance_scale: float = 8.0,
    project_text: Callable[[torch.Tensor], Any] = lambda text: text,
) -> torch.Tensor:
    """Latents (B, C, H, W) float32 from noise (B, C, H, W), text states (B, T, D) and those of ""
    (1, T, D).

    `project_text` is what the network can do once for all steps with the text that it conditions
    on.
    """
    text = project_text(guidance_text(context, uncond, guidance_scale))
    alphas_cumprod = make_alphas_cumprod(config).tolist()
    timesteps = ddim_timesteps(config.num_timesteps, steps)
    x = noise.float()
    for t, t_next in zip(timesteps, [*timesteps[1:], 0], strict=True):
        signal, sigma = alphas_cumprod[t] ** 0.5, (1 - alphas_cumprod[t]) ** 0.5
        batch_t = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
        v = guided_prediction(unet, x, batch_t, text, guidance_scale)
        x_start = signal * x - sigma * v
        predicted_noise = signal * v + sigma * x
        x = (
            alphas_cumprod[t_next] ** 0.5 * x_start
            + (1 - alphas_cumprod[t_next]) ** 0.5 * predicted_noise
        )
    return x
