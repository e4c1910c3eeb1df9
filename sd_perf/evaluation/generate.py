"""Pictures from prompts: text states, DDIM with guidance, autoencoder's decoder.

Shape letters: B pictures, C latent channels, S side of the latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from sd_perf.config import Config
from sd_perf.diffusion.ddim import ddim_sample
from sd_perf.diffusion.randomness import Stream, normal
from sd_perf.errors import UserError
from sd_perf.fast.unet import FastUNet
from sd_perf.files import disk_errors, written_aside
from sd_perf.optional import optional

Decoder = Callable[[torch.Tensor], torch.Tensor]


@torch.no_grad()
def generate(
    unet: torch.nn.Module,
    text_encoder: Callable[[list[str]], torch.Tensor],
    decode: Decoder,
    prompts: list[str],
    config: Config,
    seed: int,
    batch_size: int = 8,
) -> Iterator[torch.Tensor]:
    """A picture per prompt, in batches (B, 3, H, W) float32 in [0, 1] on the CPU, each drawn when
    it is asked for.

    `decode` takes the unscaled latents and gives images in [-1, 1]. Picture i is a function of
    (seed, i, prompt).
    """
    device = next(unet.parameters()).device
    size, channels = config.data.latent_size, config.model.in_channels
    uncond = text_encoder([""])
    once: dict[str, Any] = {"project_text": unet.project_text} if isinstance(unet, FastUNet) else {}
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        indices = torch.arange(start, start + len(batch), device=device)
        noise = normal(seed, Stream.SAMPLER, indices, channels * size * size).view(
            -1, channels, size, size
        )
        options = config.sampling.steps, config.sampling.guidance_scale
        latents = ddim_sample(
            unet, noise, text_encoder(batch), uncond, config.diffusion, *options, **once
        )
        yield ((decode(latents / config.diffusion.latent_scale) + 1) / 2).clamp(0, 1).float().cpu()


def picture_paths(prompts: list[str], folder: Path) -> list[Path]:
    """One `0000_<start of the prompt>.png` per prompt in a folder made for them; UserError where
    one is there."""
    paths = []
    for i, prompt in enumerate(prompts):
        words = "".join(c if c.isalnum() else "_" for c in prompt)[:40].strip("_")
        paths.append(folder / f"{i:04d}_{words}.png")
    for path in paths:
        if path.exists():
            raise UserError(f"{path}: exists already; choose another --output")
    with disk_errors(folder, "choose another --output"):
        folder.mkdir(parents=True, exist_ok=True)
    return paths


def save_pictures(batches: Iterable[torch.Tensor], paths: list[Path]) -> None:
    """One PNG per picture of the batches (B, 3, H, W), each batch before the next is drawn."""
    for picture, path in zip(chain.from_iterable(batches), paths, strict=True):
        with disk_errors(path, "make room, or choose another --output"):
            write_png(picture, path)


def write_png(picture: torch.Tensor, path: Path) -> None:
    """A picture (3, H, W) in [0, 1] as a PNG of 8 bits per colour."""
    Image = optional("PIL.Image", "images need Pillow", "images")
    pixels = (picture * 255).round().to(torch.uint8).permute(1, 2, 0)
    with written_aside(path) as draft:
        Image.fromarray(pixels.contiguous().numpy()).save(draft)
