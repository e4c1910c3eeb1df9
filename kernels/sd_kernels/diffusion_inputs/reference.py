"""The inputs and the target of a training step of the UNet, in plain torch.

Shape letters: B samples, C latent channels, H and W rows and columns, T timesteps.
"""

from __future__ import annotations

import torch

from sd_kernels.philox import normal, uniform_integers


def diffusion_inputs(
    moments: torch.Tensor,
    sample_indices: torch.Tensor,
    sqrt_alphas_cumprod: torch.Tensor,
    sqrt_one_minus_alphas_cumprod: torch.Tensor,
    *,
    seed: int,
    latent_scale: float,
    timestep_stream: int,
    noise_stream: int,
    moments_stream: int,
    prediction: str,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noised latents, target (B, C, H, W) and timesteps (B,) int64 of B samples.

    `moments` (B, 2C, H, W) are the autoencoder's: mean, then log-variance, which is clamped to
    [-30, 20]. `sample_indices` (B,) int64 say which samples these are. The tables (T,) float32 hold
    sqrt(alphas_cumprod) and sqrt(1 - alphas_cumprod). Noised latents have `dtype`, the target is
    float32; both are channels-last. `prediction` says which target: "v", or "epsilon" for the noise
    that the latents were noised with. Draws depend on (seed, index, stream) alone; see `philox`.

    Sources: Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022)
    for latents; Ho et al., "Denoising Diffusion Probabilistic Models" (2020), eq. 4, for noising;
    Salimans and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models" (2022),
    section 4, for v.
    """
    mean, logvar = moments.to(sqrt_alphas_cumprod.dtype).chunk(2, dim=1)
    posterior_noise, noise = (
        normal(seed, stream, sample_indices, mean[0].numel()).view(mean.shape)
        for stream in (moments_stream, noise_stream)
    )
    timesteps = uniform_integers(seed, timestep_stream, sample_indices, len(sqrt_alphas_cumprod))
    latents = latent_scale * (mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * posterior_noise)
    signal = sqrt_alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    sigma = sqrt_one_minus_alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    noisy = (signal * latents + sigma * noise).to(dtype, memory_format=torch.channels_last)
    target = noise if prediction == "epsilon" else signal * noise - sigma * latents
    target = target.contiguous(memory_format=torch.channels_last)
    return noisy, target, timesteps
