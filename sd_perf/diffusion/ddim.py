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

import torch

from sd_perf.config import DiffusionConfig
from sd_perf.diffusion.schedule import make_alphas_cumprod

Context = torch.Tensor | list[torch.Tensor]
"""text states (B, T, D), or keys and values (B, T, 2C) for each cross-attention of a UNet"""
Predictor = Callable[[torch.Tensor, torch.Tensor, Context], torch.Tensor]
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
        spaced = trailing_timesteps if config.zero_terminal_snr else ddim_timesteps
        timesteps = spaced(config.num_timesteps, steps)
        alphas = make_alphas_cumprod(config)
        x, predicted = torch.eye(2, dtype=torch.float64)  # as sums of themselves
        rows = []
        for t, t_next in zip(timesteps, [*timesteps[1:], 0], strict=True):
            # Of x and of the prediction, in the latents and in the noise ...
            both = split_prediction(x, predicted, float(alphas[t]), config.prediction)
            # ... and of these two in the next x, at the next timestep.
            following = torch.stack((alphas[t_next], 1 - alphas[t_next])).sqrt()
            rows.append(torch.cat((*both, following)))
        # Computed in float64; a step takes float32.
        self._coefficients = torch.stack(rows).to(noise.device, torch.float32)
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
        predicted = guided_prediction(self._unet, x, batch_t, self._context, self._guidance_scale)
        row = self._coefficients.index_select(0, self._number)[0]
        x_start = row[0] * x + row[1] * predicted
        predicted_noise = row[2] * x + row[3] * predicted
        # Noised to the next timestep (Song et al. 2021, equation 12 with sigma_t = 0).
        x.copy_(row[4] * x_start + row[5] * predicted_noise)
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
