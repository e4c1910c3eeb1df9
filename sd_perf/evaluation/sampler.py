"""Draws latents with a UNet; on a GPU a denoising step is a CUDA graph, one for each batch size.

Shape letters: B samples, C latent channels, H and W latent rows and columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sd_perf.config import Config
from sd_perf.diffusion.ddim import Context, Denoising, Predictor, guidance_context
from sd_perf.fast.graph import WARM_UP_PASSES, Runner


class Sampler:
    """Calls draw latents (B, C, H, W) float32; the host waits for nothing while they are drawn.

    A graph refers to the weights by their place: make another sampler where the UNet gets others.
    """

    def __init__(self, unet: Predictor, config: Config) -> None:
        self._unet, self._config = unet, config
        self._steps: dict[int, tuple[Denoising, Runner]] = {}

    @torch.no_grad()
    def __call__(self, noise: torch.Tensor, context: Context, uncond: Context) -> torch.Tensor:
        """Latents from noise (B, C, H, W); `context` and `uncond` as for `ddim_sample`."""
        sampling = self._config.sampling
        both = guidance_context(context, uncond, sampling.guidance_scale)
        if len(noise) not in self._steps:
            denoising = Denoising(
                self._unet,
                noise,
                both,
                self._config.diffusion,
                sampling.steps,
                sampling.guidance_scale,
            )
            self._steps[len(noise)] = denoising, self._runner(denoising, noise, both)
        denoising, runner = self._steps[len(noise)]
        denoising.fill(noise, both)
        for _ in range(sampling.steps):
            runner.run()
        return denoising.latents.clone()

    def _runner(self, denoising: Denoising, noise: torch.Tensor, context: Context) -> Runner:
        """Runs a step: as a graph on a GPU, unless training.cuda_graph is off."""
        runner = Runner(denoising.step)
        if noise.device.type == "cuda" and self._config.training.cuda_graph == "auto":
            runner.warm_up(_rehearsal(denoising, noise, context))
            runner.capture()
        return runner


def _rehearsal(denoising: Denoising, noise: torch.Tensor, context: Context) -> Callable[[], None]:
    def rehearse() -> None:
        for _ in range(WARM_UP_PASSES):
            denoising.fill(noise, context)
            denoising.step()

    return rehearse
