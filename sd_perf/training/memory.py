"""Whether a training step can fit, asked before anything is allocated."""

from __future__ import annotations

from sd_perf.config import Config
from sd_perf.distributed.world import World
from sd_perf.fast.architecture import architecture
from sd_perf.memory import require_memory


def require_step_fits(config: Config, world: World) -> None:
    """UserError where a step of this rank needs more memory than its device has."""
    require_memory(
        least_bytes(config, world.size),
        world.device,
        "training",
        "make the model (model.*), data.latent_size or training.global_batch_size smaller, or take "
        "more ranks or training.accumulate_steps",
    )


def least_bytes(config: Config, world_size: int) -> int:
    """A lower bound of the bytes that a step needs on each rank.

    Weights, gradients and both moments of AdamW in float32; per sample the moments and latents, and
    the first level's skips, which every way of training keeps until the backward pass, in 16 bits.
    """
    parameters = architecture(config).parameters
    pixels = config.data.latent_size**2
    inputs = 4 * (2 + 1) * config.model.in_channels * pixels
    skips = 2 * (config.model.num_res_blocks + 1) * config.model.model_channels * pixels
    return 16 * parameters + config.micro_batch_size(world_size) * (inputs + skips)
