"""Pictures of a user's own prompts, drawn with the weights of a run."""

from __future__ import annotations

import dataclasses
from itertools import chain
from pathlib import Path

import torch

from sd_perf.config import SamplingConfig
from sd_perf.errors import UserError
from sd_perf.evaluation.generate import generate, picture_paths, save_pictures
from sd_perf.models.build import DTYPES, build_sampling_unet, build_text_encoder
from sd_perf.models.readers import newest_checkpoint, read_decoder, read_unet
from sd_perf.models.weight_files import load_into
from sd_perf.runs.folder import read_run_config


def draw_prompts(
    source: Path,
    prompts: list[str],
    autoencoder: Path | None,
    output: Path,
    *,
    steps: int | None = None,
    guidance_scale: float | None = None,
    seed: int = 0,
    ema: bool = False,
) -> list[Path]:
    """Draw a picture per prompt and write each to a PNG in `output`; returns the paths.

    `source` is a run folder, which stands for its newest checkpoint, or one of its checkpoints.
    `autoencoder` is the file of a decoder; None takes the one that the run's section `evaluation`
    names. Where `steps` or `guidance_scale` is None, the run's section `sampling` says. `ema` draws
    with the moving average of the weights. Draws on the GPU where there is one. UserError where
    there is no prompt, where a file that is needed cannot be used, and where a picture exists
    already.
    """
    if not prompts:
        raise UserError("--prompt: give one or more prompts")
    checkpoint, run = newest_checkpoint(source)
    config = read_run_config(run)
    sampling = SamplingConfig(
        steps=config.sampling.steps if steps is None else steps,
        guidance_scale=config.sampling.guidance_scale if guidance_scale is None else guidance_scale,
    )
    config = dataclasses.replace(config, sampling=sampling)
    if autoencoder is None and not config.evaluation.autoencoder:
        raise UserError(f"--autoencoder: give one; evaluation.autoencoder of {run} names none")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    file = autoencoder or Path(config.evaluation.autoencoder)
    decode = read_decoder(file, device, DTYPES[config.evaluation.precision])
    unet = build_sampling_unet(config, device)
    load_into(unet, read_unet(checkpoint, ema=ema)[0], "the UNet", checkpoint)
    text_encoder = build_text_encoder(config, device)
    paths = picture_paths(prompts, output)
    drawn = generate(
        unet, text_encoder, decode, prompts, config=config, seed=seed, source=checkpoint
    )
    save_pictures(chain.from_iterable(drawn), paths)
    return paths
