"""Whether a training step can fit, asked before anything is allocated."""

from __future__ import annotations

from sd_perf.config import Config
from sd_perf.distributed.world import World
from sd_perf.fast.architecture import architecture
from sd_perf.memory import require_memory
from sd_perf.models.vae import IMAGE_CHANNELS, PIXELS_PER_LATENT


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

    The training state; per sample the pixels where such are encoded, the moments and latents, and
    the first level's skips, which every way of training keeps until the backward pass, in 16 bits;
    and the network that draws the pictures of sampling.every_samples, which rank 0 has.
    """
    pixels = config.data.latent_size**2
    inputs = 4 * (2 + 1) * config.model.in_channels * pixels
    if config.data.format == "raw":
        inputs += 4 * IMAGE_CHANNELS * PIXELS_PER_LATENT**2 * pixels
    skips = 2 * (config.model.num_res_blocks + 1) * config.model.model_channels * pixels
    state = sum(state_bytes(config, world_size).values())
    drawing = 4 * architecture(config).parameters if config.sampling.every_samples else 0
    return state + drawing + config.micro_batch_size(world_size) * (inputs + skips)


def state_bytes(config: Config, world_size: int) -> dict[str, int]:
    """Bytes that weights, gradients, AdamW's moments and the average take on each rank.

    Padding is not counted. There is an average where training.ema_decay asks for one.

    In precision bf16 the fast network's weights are bfloat16 with 16-bit remainders, and its
    gradients bfloat16, unless micro-batches are summed. The plain network's are all float32.
    """
    parameters, training = architecture(config).parameters, config.training
    is_fast = config.model.implementation == "fast"
    is_split = is_fast and training.precision == "bf16"
    is_divided = is_fast and training.strategy != "ddp"
    share = parameters // (world_size if is_divided else 1)
    sums_in_16_bits = is_split and training.accumulate_steps == 1
    ema = {"ema": 4 * share} if training.ema_decay else {}
    return {
        "weights": 2 * parameters + 2 * share if is_split else 4 * parameters,
        "gradients": (2 if sums_in_16_bits else 4) * parameters,
        "adamw_moments": 8 * share,
        **ema,
    }
