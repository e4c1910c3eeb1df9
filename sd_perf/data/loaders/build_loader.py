"""Builds the loader that a config asks for."""

from __future__ import annotations

import torch

from sd_perf.config import Config
from sd_perf.data.batch import Loader, LoaderOptions
from sd_perf.data.loaders.dali import DaliLoader
from sd_perf.data.loaders.portable import PortableLoader
from sd_perf.data.loaders.synthetic import SyntheticLoader
from sd_perf.data.shards import ShardIndex
from sd_perf.distributed.world import World


def build_loader(config: Config, seed: int, world: World) -> Loader:
    """This rank's loader. Every rank of the world must call it.

    Raises DataError for shards that cannot be used.
    """
    data = config.data
    if data.format != "synthetic":
        # The main rank builds the index file first; then every rank, the main one too, reads it.
        world.on_main(lambda: len(ShardIndex.open(data.path, data.index, format=data.format)))
    return world.together(lambda: loader_of(config, seed, world.rank, world.size, world.device))


def loader_of(
    config: Config,
    seed: int,
    rank: int,
    world_size: int,
    device: torch.device = LoaderOptions.device,
) -> Loader:
    """The loader of one of the ranks that share the config's batch, for a step on this device."""
    data = config.data
    options = LoaderOptions(
        seed=seed,
        global_batch_size=config.training.global_batch_size,
        micro_batch_size=config.micro_batch_size(world_size),
        rank=rank,
        world_size=world_size,
        in_channels=config.model.in_channels,
        context_dim=config.model.context_dim,
        device=device,
    )
    if data.format == "synthetic":
        return SyntheticLoader(data, options, config.diffusion.latent_scale)
    return DaliLoader(data, options) if data.loader == "dali" else PortableLoader(data, options)
