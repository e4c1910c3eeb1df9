"""Builds the training step of a config's network."""

from __future__ import annotations

import torch

from sd_perf.config import Config
from sd_perf.distributed.world import World
from sd_perf.fast.ops import Ops
from sd_perf.fast.unet import FastUNet
from sd_perf.models.build import ImageEncoder, TextEncoder
from sd_perf.training.fast_step import FastStep
from sd_perf.training.plain_step import PlainStep
from sd_perf.training.step import TrainStep


def build_step(
    unet: torch.nn.Module,
    config: Config,
    *,
    seed: int,
    world: World,
    text_encoder: TextEncoder | None,
    ops: Ops | None,
    image_encoder: ImageEncoder | None = None,
) -> TrainStep:
    """The step of a float32 UNet, which it may change to bfloat16.

    `ops` are the chosen operators of the fast network, None for the plain one.
    """
    if ops is None:
        return PlainStep(unet, config, seed, world, text_encoder, image_encoder)
    if not isinstance(unet, FastUNet):
        raise TypeError(f"operators are for the fast network, not {type(unet).__name__}")
    can_trace = config.training.strategy != "zero1" or not config.model.compile or world.size == 1
    right = "auto or ddp with model.compile, since torch.compile cannot trace the waits of zero1"
    config.training.require(can_trace, "strategy", right)
    return FastStep(unet, config, seed, world, text_encoder, ops, image_encoder)
