"""Level trajectory: the loss over a few hundred steps of the config's own run, of the fast and of
the plain network.

Two runs that differ by one rounding drift apart, the more the longer they last. How far plain torch
drifts from itself is measured: by runs whose initial weights are moved by half an ulp.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from sd_perf.config import Config
from sd_perf.data.loaders.build import build_loader
from sd_perf.distributed.world import World
from sd_perf.models.build import build_text_encoder, build_unet, choose_ops
from sd_perf.tools.parity.rows import Row, compared
from sd_perf.tools.parity.subject import SEED, Subject
from sd_perf.training.step import TrainStep

STEPS = 200
WINDOW = 20
"""steps whose mean loss is one number of a curve"""
MOVED = ("plain, moved by half an ulp", "plain, moved otherwise")


def compare_trajectories(subject: Subject, curves: dict[str, list[float]]) -> Iterator[Row]:
    """Mean losses of windows; adds each run's to `curves`."""
    config = subject.config
    plain = dataclasses.replace(
        config, model=dataclasses.replace(config.model, implementation="plain")
    )
    for name, chosen, moved in (
        ("plain", plain, 0),
        ("fast", config, 0),
        *((MOVED[i], plain, i + 1) for i in (0, 1)),
    ):
        losses = _losses(chosen, subject.device, moved)
        curves[name] = losses.unflatten(0, (-1, WINDOW)).mean(dim=1).tolist()
    truth, ours, *others = (
        [torch.tensor(curves[name], dtype=torch.float64)] for name in ("plain", "fast", *MOVED)
    )
    dtype = "bfloat16" if config.training.precision == "bf16" else "float32"
    yield compared(
        "trajectory", f"loss over {STEPS} steps", subject.where, dtype, ours, others, truth
    )


def _losses(config: Config, device: torch.device, moved: int) -> torch.Tensor:
    """Loss of every step (STEPS,)."""
    seed = config.training.seed or 0
    world = World(0, 1, device)
    ops = choose_ops(config)
    unet = build_unet(config, seed, device, ops)
    if moved:
        _move(unet, moved)
    captions_only = config.data.format == "moments" and config.data.context == "open_clip"
    text_encoder = build_text_encoder(config, device) if captions_only else None
    step = TrainStep(unet, config, seed, world, text_encoder, ops)
    batches = build_loader(config, seed, world).batches(0)
    losses = [step(batches, number)[0] for number in range(STEPS)]
    return torch.stack(losses).cpu().double()


@torch.no_grad()
def _move(unet: torch.nn.Module, number: int) -> None:
    generator = torch.Generator().manual_seed(SEED + number)
    for parameter in unet.parameters():
        signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
        # A quarter above half an ulp, so that float32 rounds to its neighbour.
        parameter.mul_(1 + signs.to(parameter.device) * 1.25 * 2.0**-24)
