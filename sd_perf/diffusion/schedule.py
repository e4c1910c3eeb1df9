"""The forward process: noise schedule, noising, target.

Ho et al. 2020 (arXiv 2006.11239), section 2: beta_t is the variance added at timestep t, and
alphas_cumprod_t (the paper's alpha bar) the product of 1 - beta up to t.

Shape letters: B samples, C channels, H and W latent rows and columns.
"""

from __future__ import annotations

import torch

from sd_perf.config import DiffusionConfig


def make_alphas_cumprod(config: DiffusionConfig) -> torch.Tensor:
    """Cumulative products of 1 - beta, (num_timesteps,) float64.

    The square roots of the betas are evenly spaced. This is "linear" in the LDM code base
    (`ldm/modules/diffusionmodules/util.py`) and "scaled_linear" in diffusers. The last value is
    0.00466 with the benchmark's betas: the terminal SNR is not zero, unless zero_terminal_snr
    rescales the schedule.
    """
    start, end = config.beta_start**0.5, config.beta_end**0.5
    betas = torch.linspace(start, end, config.num_timesteps, dtype=torch.float64) ** 2
    alphas_cumprod = torch.cumprod(1.0 - betas, dim=0)
    return with_zero_terminal_snr(alphas_cumprod) if config.zero_terminal_snr else alphas_cumprod


def with_zero_terminal_snr(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """The schedule (T,) shifted and scaled so that its last value is 0 and its first one stays.

    Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed" (arXiv
    2305.08891), algorithm 1.
    """
    roots = alphas_cumprod.sqrt()
    first, last = roots[0], roots[-1]
    return ((roots - last) * (first / (first - last))) ** 2


def min_snr_weights(alphas_cumprod: torch.Tensor, gamma: float, prediction: str) -> torch.Tensor:
    """The weight (T,) of a sample's squared error at each timestep; `prediction` is v or epsilon.

    Hang et al. 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy" (arXiv
    2303.09556), section 3.4: with SNR = alphas_cumprod / (1 - alphas_cumprod) it is
    min(SNR, gamma) / (SNR + 1) for v and min(SNR, gamma) / SNR for epsilon. Written without SNR
    below, which is 0 or infinite at the ends.
    """
    noise = 1.0 - alphas_cumprod
    if prediction == "epsilon":
        return (gamma * noise / alphas_cumprod).clamp(max=1.0)
    return torch.minimum(alphas_cumprod, gamma * noise)


class Schedule(torch.nn.Module):
    """Noising and targets, with sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod) in float32.

    The buffers move with the module and are not part of its state dict.
    """

    sqrt_alphas_cumprod: torch.Tensor
    sqrt_one_minus_alphas_cumprod: torch.Tensor

    root_weights: torch.Tensor | None

    def __init__(self, config: DiffusionConfig, min_snr_gamma: float = 0.0) -> None:
        """With `min_snr_gamma` above 0, samples have the weights of `min_snr_weights`."""
        super().__init__()
        self.prediction = config.prediction
        alphas_cumprod = make_alphas_cumprod(config)
        # The roots are taken in float64 and rounded once.
        signal, sigma = alphas_cumprod.sqrt().float(), (1.0 - alphas_cumprod).sqrt().float()
        self.register_buffer("sqrt_alphas_cumprod", signal, persistent=False)
        self.register_buffer("sqrt_one_minus_alphas_cumprod", sigma, persistent=False)
        roots = None
        if min_snr_gamma:
            weights = min_snr_weights(alphas_cumprod, min_snr_gamma, config.prediction)
            roots = weights.sqrt().float()
        self.register_buffer("root_weights", roots, persistent=False)

    def _coefficients(self, timesteps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two roots at timesteps (B,), each (B, 1, 1, 1)."""
        shape = (-1, 1, 1, 1)
        signal = self.sqrt_alphas_cumprod[timesteps].view(shape)
        return signal, self.sqrt_one_minus_alphas_cumprod[timesteps].view(shape)

    def add_noise(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """x_t = sqrt(alphas_cumprod_t) latents + sqrt(1 - alphas_cumprod_t) noise, (B, C, H, W).

        Ho et al. 2020, equation 4. `timesteps` is (B,) int64.
        """
        signal, sigma = self._coefficients(timesteps)
        return signal * latents + sigma * noise

    def target(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """What the UNet is to predict, (B, C, H, W): v, or with epsilon the noise."""
        return noise if self.prediction == "epsilon" else self.v_target(latents, noise, timesteps)

    def v_target(
        self, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """v = sqrt(alphas_cumprod_t) noise - sqrt(1 - alphas_cumprod_t) latents, (B, C, H, W).

        Salimans & Ho 2022 (arXiv 2202.00512), section 4. `timesteps` is (B,) int64.
        """
        signal, sigma = self._coefficients(timesteps)
        return signal * noise - sigma * latents

    def weighed(
        self, prediction: torch.Tensor, target: torch.Tensor, timesteps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prediction and target (B, C, H, W), of which the mean squared error is the loss.

        Where samples have weights, both are times the root of their sample's weight: the squared
        error is then times the weight.
        """
        if self.root_weights is None:
            return prediction, target
        roots = self.root_weights[timesteps].view(-1, 1, 1, 1)
        return prediction * roots, target * roots
