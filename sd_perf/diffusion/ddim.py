"""DDIM sampling with classifier-free guidance, of a UNet that predicts v or the noise.

- DDIM with eta 0: Song et al. 2021 (arXiv 2010.02502), equation 12 with sigma_t = 0
- v-prediction: Salimans & Ho 2022 (arXiv 2202.00512), section 4 and appendix D
- noise (epsilon): Ho et al. 2020 (arXiv 2006.11239), equation 4, solved for the latents
- guidance: Ho & Salimans 2022 (arXiv 2207.12598), equation 6

The timesteps are the benchmark's: 1, 1 + stride, ... with stride num_timesteps // steps. The last
step ends at alphas_cumprod[0], not at 1.

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
"""a UNet: noisy latents, timesteps and context to predictions"""


def trailing_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """Timesteps that begin at the last one: 999, 979, ..., 19 for 50 steps of 1000.

    Lin et al. 2023 (arXiv 2305.08891), section 3.3 and table 2, "trailing": a schedule whose last
    timestep is noise alone must be sampled from there.
    """
    return [round(num_timesteps * (steps - i) / steps) - 1 for i in range(steps)]


def ddim_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """Timesteps from the noisiest to the cleanest: 981, 961, ..., 1 for 50 steps of 1000.

    They are the reference's (LDM's `make_ddim_timesteps`, "uniform") where `steps` divides
    `num_timesteps`. Elsewhere the reference takes range(0, num_timesteps, stride) + 1, which has
    more steps than were asked for: 12 of 1000 give it 13, from 997. Here they are as many as asked
    for, 12 from 914. The closed division allows 50 steps of 1000 alone.
    """
    stride = num_timesteps // steps
    return [min(1 + stride * i, num_timesteps - 1) for i in reversed(range(steps))]


def guidance_context(
    context: torch.Tensor, uncond: torch.Tensor, guidance_scale: float
) -> torch.Tensor:
    """The context of a guided prediction: [uncond, context] (2B, T, D).

    With guidance_scale 1 there is no guidance, and it is context (B, T, D) alone.
    """
    return context if guidance_scale == 1.0 else torch.cat((uncond.expand_as(context), context))


def guided_prediction(
    unet: Predictor, x: torch.Tensor, timesteps: torch.Tensor, context: Any, guidance_scale: float
) -> torch.Tensor:
    """uncond + guidance_scale (cond - uncond) of the predictions, (B, C, H, W) float32.

    Ho & Salimans 2022, equation 6, with their w = guidance_scale - 1. Both predictions come from
    one call of the UNet on the context that `guidance_context` gives.
    """
    if guidance_scale == 1.0:
        return unet(x, timesteps, context).float()
    both = unet(torch.cat((x, x)), torch.cat((timesteps, timesteps)), context)
    uncond, cond = both.float().chunk(2)
    return uncond + guidance_scale * (cond - uncond)


def split_prediction(
    x: torch.Tensor, predicted: torch.Tensor, alpha: float, prediction: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The latents and the noise, (B, C, H, W) each, that a prediction says noisy latents x are of.

    `alpha` is alphas_cumprod at the timestep of x, `prediction` what is predicted: v or epsilon.
    """
    signal, sigma = alpha**0.5, (1 - alpha) ** 0.5
    if prediction == "epsilon":
        return (x - sigma * predicted) / signal, predicted
    return signal * x - sigma * predicted, signal * predicted + sigma * x


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
    """Draw latents (B, C, H, W) float32, scaled as in training, from noise (B, C, H, W).

    `context` holds the text states (B, T, D) of the captions, `uncond` those of the empty caption
    (1, T, D). `project_text` is applied once to the context before it goes to every UNet call: a
    network may compute there what does not depend on the timestep.
    """
    conditioning = project_text(guidance_context(context, uncond, guidance_scale))
    # On the host in float64, so that the coefficients of a step are plain Python numbers.
    alphas_cumprod = make_alphas_cumprod(config).tolist()
    spaced = trailing_timesteps if config.zero_terminal_snr else ddim_timesteps
    timesteps = spaced(config.num_timesteps, steps)
    x = noise.float()
    for t, t_next in zip(timesteps, [*timesteps[1:], 0], strict=True):
        batch_t = torch.full((len(x),), t, dtype=torch.int64, device=x.device)
        predicted = guided_prediction(unet, x, batch_t, conditioning, guidance_scale)
        x_start, predicted_noise = split_prediction(
            x, predicted, alphas_cumprod[t], config.prediction
        )
        # Noised to the next timestep (Song et al. 2021, equation 12 with sigma_t = 0).
        x = (
            alphas_cumprod[t_next] ** 0.5 * x_start
            + (1 - alphas_cumprod[t_next]) ** 0.5 * predicted_noise
        )
    return x
