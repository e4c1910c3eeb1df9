"""Level trajectory: losses over a few hundred steps of the config's own run, with both networks.

Two runs that differ by one rounding drift apart, the further the longer they last. Two more plain
runs measure how far plain torch drifts from itself: their initial weights are moved by half an ulp.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from sd_perf.config import Config
from sd_perf.data.loaders.build_loader import build_loader
from sd_perf.distributed.world import World
from sd_perf.fast.ops import Ops
from sd_perf.models.build import build_encoders, build_unet
from sd_perf.tools.parity.comparison import Comparison
from sd_perf.tools.parity.parity_case import SEED, ParityCase
from sd_perf.training.build_step import build_step

STEPS = 200
WINDOW = 20
"""steps whose mean loss is one number of a curve"""
MOVED = ("plain, moved by half an ulp", "plain, moved otherwise")


def compare_loss_curves(case: ParityCase, curves: dict[str, list[float]]) -> Iterator[Comparison]:
    """Compare the mean losses of windows of steps; the plain run's are the truth.

    Adds the curve of each run (STEPS / WINDOW numbers) to `curves`, by name.
    """
    fast = case.config
    plain = dataclasses.replace(fast, model=dataclasses.replace(fast.model, implementation="plain"))
    # Not `case.ops`: calls that are counted cannot be compiled, which the config may ask for.
    ops = Ops.chosen(case.choices)
    losses = {
        "plain": _losses(plain, case.device, ops=None),
        "fast": _losses(fast, case.device, ops=ops),
        MOVED[0]: _losses(plain, case.device, ops=None, moved=1),
        MOVED[1]: _losses(plain, case.device, ops=None, moved=2),
    }
    for name, of_steps in losses.items():
        curves[name] = of_steps.unflatten(0, (-1, WINDOW)).mean(dim=1).tolist()
    as_tensors = {name: [torch.tensor(curves[name], dtype=torch.float64)] for name in losses}
    dtype = "bfloat16" if fast.training.precision == "bf16" else "float32"
    yield case.comparer("trajectory", dtype).tensors(
        f"loss over {STEPS} steps",
        fast=as_tensors["fast"],
        torch_results=[as_tensors[name] for name in MOVED],
        truth=as_tensors["plain"],
    )


def _losses(
    config: Config, device: torch.device, *, ops: Ops | None, moved: int | None = None
) -> torch.Tensor:
    """Loss of every step (STEPS,) float64; `moved` says which way initial weights are moved."""
    seed = config.training.seed or 0
    world = World(rank=0, size=1, device=device)
    unet = build_unet(config, seed=seed, device=device, ops=ops)
    if moved is not None:
        _move_by_half_an_ulp(unet, seed=SEED + moved)
    text_encoder, image_encoder = build_encoders(config, device)
    step = build_step(
        unet,
        config,
        seed=seed,
        world=world,
        text_encoder=text_encoder,
        image_encoder=image_encoder,
        ops=ops,
    )
    batches = build_loader(config, seed, world).batches(0)
    losses = [step(batches, index)[0] for index in range(STEPS)]
    return torch.stack(losses).cpu().double()


@torch.no_grad()
def _move_by_half_an_ulp(unet: torch.nn.Module, *, seed: int) -> None:
    """Move every float32 weight, in place, to the neighbour above or below, as the seed draws."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in unet.parameters():
        signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
        # A quarter above half an ulp, so that float32 rounds to the neighbour.
        parameter.mul_(1 + signs.to(parameter.device) * 1.25 * 2.0**-24)
