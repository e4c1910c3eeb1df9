"""Pictures from prompts: text encoder, DDIM with guidance, decoder of the autoencoder.

Shape letters: B pictures, C latent channels, H and W rows and columns of the pictures, pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from sd_perf.config import Config
from sd_perf.data.images import write_png
from sd_perf.diffusion.ddim import Predictor
from sd_perf.diffusion.randomness import Stream, normal
from sd_perf.errors import CheckpointError, UserError
from sd_perf.evaluation.sampler import Sampler
from sd_perf.files import disk_errors
from sd_perf.memory import require_memory
from sd_perf.models.vae import PIXELS_PER_LATENT

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
    starts: Sequence[int] | None = None,
    source: object = "the weights",
) -> Iterator[torch.Tensor]:
    """Draw a picture per prompt, in batches (B, 3, H, W) float32 in [0, 1] on the CPU.

    A batch is drawn when it is asked for. Picture i is a function of (seed, i, its prompt), for any
    batch size. `text_encoder` gives the text states of captions; `decode` takes unscaled latents
    and gives images in [-1, 1]. `starts` names the first prompt of each batch to draw, None all
    batches. `source` names the weights in messages, as a checkpoint's path.

    Raises CheckpointError for a picture that is NaN or infinite, before its batch is given.
    """
    device = next(unet.parameters()).device
    size, channels = config.data.latent_size, config.model.in_channels
    pixels, batch_size = PIXELS_PER_LATENT * size, min(batch_size, len(prompts) or 1)
    require_memory(
        4 * 3 * pixels**2 * batch_size,
        device,
        f"drawing {batch_size} pictures of {pixels}x{pixels} pixels at a time",
        "draw fewer (evaluation.batch_size), or train on a smaller data.latent_size",
    )
    dtype, predict = next(unet.parameters()).dtype, _in_dtype_of_weights(unet)
    project: Any = unet.project_text  # of both UNets
    sampler, uncond = Sampler(predict, config), project(text_encoder([""]).to(dtype))
    for start in range(0, len(prompts), batch_size) if starts is None else starts:
        batch = prompts[start : start + batch_size]
        indices = torch.arange(start, start + len(batch), device=device)
        noise = normal(seed, Stream.SAMPLER, indices, channels * size * size)
        context = project(text_encoder(batch).to(dtype))
        latents = sampler(noise.view(-1, channels, size, size), context, uncond)
        _require_finite(latents, "latents", source)
        images = decode(latents / config.diffusion.latent_scale)
        _require_finite(images, "pictures", source)
        yield ((images + 1) / 2).clamp(0, 1).float().cpu()


def _in_dtype_of_weights(unet: torch.nn.Module) -> Predictor:
    dtype = next(unet.parameters()).dtype
    return lambda x, timesteps, context: unet(x.to(dtype), timesteps, context)


def _require_finite(values: torch.Tensor, what: str, source: object) -> None:
    """CheckpointError where a batch of `what` holds values that are NaN or infinite."""
    wrong = (~torch.isfinite(values)).flatten(1).any(dim=1).sum().item()
    if wrong:
        raise CheckpointError(
            f"{source}: {wrong} of {len(values)} {what} that it gives are NaN or infinite; "
            "take an earlier checkpoint, or a smaller guidance scale"
        )


def picture_paths(prompts: list[str], folder: Path) -> list[Path]:
    """Paths `0000_<start of the prompt>.png`, one per prompt, in a folder that is made for them.

    Raises UserError where one of them exists.
    """
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


def numbered_paths(folder: Path, start: int, count: int) -> list[Path]:
    """Paths `00000012.png` for pictures from `start` on, in a folder that is made for them."""
    with disk_errors(folder, "choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
    return [folder / f"{index:08d}.png" for index in range(start, start + count)]


def save_pictures(pictures: Iterable[torch.Tensor], paths: list[Path]) -> None:
    """Write a PNG per picture (3, H, W) in [0, 1], each before the next is asked for."""
    for picture, path in zip(pictures, paths, strict=True):
        with disk_errors(path, "make room, or choose another --output"):
            write_png(picture, path)
