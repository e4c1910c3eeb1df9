"""DDIM sampling of a v-prediction model with classifier-free guidance.

- DDIM with eta 0: Song et al. 2021 (arXiv 2010.02502), equation 12 with sigma_t = 0
- v-prediction: Salimans & Ho 2022 (arXiv 2202.00512), section 4 and appendix D
- guidance: Ho & Salimans 2022 (arXiv 2207.12598), equation 6

The timesteps are the benchmark's: 1, 1 + stride, ... with stride num_timesteps // steps. The last
step ends at alphas_cumprod[0], not at 1.

Shape letters: B samples, C channels, H and W latent rows and columns, T text tokens, D context
channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sd_perf.config import DiffusionConfig
from sd_perf.diffusion.schedule import make_alphas_cumprod

Context = torch.Tensor | list[torch.Tensor]
"""text states (B, T, D), or keys and values (B, T, 2C) for each cross-attention of a UNet"""
Predictor = Callable[[torch.Tensor, torch.Tensor, Context], torch.Tensor]
"""a UNet: noisy latents, timesteps and context to predictions of v"""


def ddim_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """Timesteps from the noisiest to the cleanest: 981, 961, ..., 1 for 50 steps of 1000.

    They are the reference's (LDM's `make_ddim_timesteps`, "uniform") where `steps` divides
    `num_timesteps`. Elsewhere the reference takes range(0, num_timesteps, stride) + 1, which has
    more steps than were asked for: 12 of 1000 give it 13, from 997. Here they are as many as asked
    for, 12 from 914. The closed division allows 50 steps of 1000 alone.
    """
    stride = num_timesteps // steps
    return [min(1 + stride * i, num_timesteps - 1) for i in reversed(range(steps))]


def guidance_context(context: Context, uncond: Context, guidance_scale: float) -> Context:
    """The context of a guided prediction: [uncond, context], twice the batch, of every tensor.

    `context` is (B, T, D), or a list of such; `uncond` is the same for one caption. With
    guidance_scale 1 there is no guidance, and it is context alone.
    """
    if guidance_scale == 1.0:
        return context
    if isinstance(context, list):
        return [torch.cat((u.expand_as(c), c)) for u, c in zip(uncond, context, strict=True)]
    assert isinstance(uncond, torch.Tensor)
    return torch.cat((uncond.expand_as(context), context))


def guided_prediction(
    unet: Predictor,
    x: torch.Tensor,
    timesteps: torch.Tensor,
    context: Context,
    guidance_scale: float,
) -> torch.Tensor:
    """v_uncond + guidance_scale (v_cond - v_uncond), (B, C, H, W) float32.

    Ho & Salimans 2022, equation 6, with their w = guidance_scale - 1. Both predictions come from
    one call of the UNet on the context that `guidance_context` gives.
    """
    if guidance_scale == 1.0:
        return unet(x, timesteps, context).float()
    both = unet(torch.cat((x, x)), torch.cat((timesteps, timesteps)), context)
    v_uncond, v_cond = both.float().chunk(2)
    return v_uncond + guidance_scale * (v_cond - v_uncond)


class Denoising:
    """The DDIM steps of one batch, on tensors of fixed place: `fill`, then `step` so many times.

    A step reads its number, timestep and coefficients from the device, and the host reads nothing.
    So steps may be queued without waiting, and one of them may be recorded as a CUDA graph.
    """

    def __init__(
        self,
        unet: Predictor,
        noise: torch.Tensor,
        context: Context,
        config: DiffusionConfig,
        steps: int,
        guidance_scale: float,
    ) -> None:
        """`noise` (B, C, H, W) and `context`, from `guidance_context`, give shapes and device."""
        self._unet, self._guidance_scale = unet, guidance_scale
        self.latents = torch.empty_like(noise, dtype=torch.float32)
        self._context = _empty_like(context)
        timesteps = ddim_timesteps(config.num_timesteps, steps)
        # Roots in float64, of which a step needs float32.
        alphas = make_alphas_cumprod(config)[torch.tensor([timesteps, [*timesteps[1:], 0]])]
        roots = torch.stack((alphas[0], 1 - alphas[0], alphas[1], 1 - alphas[1]), 1).sqrt()
        self._coefficients = roots.to(noise.device, torch.float32)
        self._timesteps = torch.tensor(timesteps, device=noise.device)
        self._number = torch.zeros(1, dtype=torch.int64, device=noise.device)
        self.fill(noise, context)

    def fill(self, noise: torch.Tensor, context: Context) -> None:
        """Begin with this noise and context, of the same shapes."""
        self.latents.copy_(noise)
        for place, given in zip(_tensors(self._context), _tensors(context), strict=True):
            place.copy_(given)
        self._number.zero_()

    def step(self) -> None:
        """Take the latents (B, C, H, W) float32 to the next timestep."""
        x = self.latents
        batch_t = self._timesteps.index_select(0, self._number).expand(len(x))
        v = guided_prediction(self._unet, x, batch_t, self._context, self._guidance_scale)
        coefficients = self._coefficients.index_select(0, self._number)[0]
        signal, sigma, next_signal, next_sigma = coefficients.unbind()
        # The two predictions that v holds (Salimans & Ho 2022, section 4 and appendix D) ...
        x_start = signal * x - sigma * v
        predicted_noise = signal * v + sigma * x
        # ... noised to the next timestep (Song et al. 2021, equation 12 with sigma_t = 0).
        x.copy_(next_signal * x_start + next_sigma * predicted_noise)
        self._number += 1


def _tensors(context: Context) -> list[torch.Tensor]:
    return context if isinstance(context, list) else [context]


def _empty_like(context: Context) -> Context:
    if isinstance(context, list):
        return [torch.empty_like(each) for each in context]
    return torch.empty_like(context)


@torch.no_grad()
def ddim_sample(
    unet: Predictor,
    noise: torch.Tensor,
    context: Context,
    uncond: Context,
    config: DiffusionConfig,
    steps: int = 50,
    guidance_scale: float = 8.0,
) -> torch.Tensor:
    """Draw latents (B, C, H, W) float32, scaled as in training, from noise (B, C, H, W).

    `context` holds the text states (B, T, D) of the captions, `uncond` those of the empty caption
    (1, T, D); or both what the UNet's `project_text` makes of them, for all steps at once.
    """
    both = guidance_context(context, uncond, guidance_scale)
    denoising = Denoising(unet, noise, both, config, steps, guidance_scale)
    for _ in range(steps):
        denoising.step()
    return denoising.latents
