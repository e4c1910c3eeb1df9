"""The sentence where a step ran out of memory: what would fit, by the project's own estimate."""

from __future__ import annotations

from pathlib import Path

import torch

from sd_perf.config import Config
from sd_perf.distributed.world import World
from sd_perf.errors import UserError
from sd_perf.files import one_line
from sd_perf.memory import available_bytes, held_bytes
from sd_perf.tools.estimate.dry_run import dry_run
from sd_perf.training.callbacks.profile import FOLDER

_OF_A_CPU = ("can't allocate memory", "not enough memory")
"""torch's words where the CPU allocator fails, which has no exception class of its own"""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory of a GPU or of this machine ran out."""
    if isinstance(error, RuntimeError) and any(words in str(error) for words in _OF_A_CPU):
        return True
    return isinstance(error, torch.OutOfMemoryError | MemoryError)


def out_of_memory(config: Config, world: World) -> UserError:
    """The error to raise instead: it names the samples that fit and the option that makes it so.

    On a GPU it also names a file with what lies in its memory, in the run folder.
    """
    return UserError(f"{_what_fits(config, world)}{_snapshot(config, world)}")


def _snapshot(config: Config, world: World) -> str:
    """Words about the file to which this rank's GPU memory was dumped; empty on a CPU."""
    folder = Path(config.run.dir)
    # Memory that runs out before the run has begun leaves no folder.
    if world.device.type != "cuda" or not folder.is_dir():
        return ""
    path = folder / FOLDER / f"memory_rank_{world.rank}.pickle"
    try:
        path.parent.mkdir(exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(path))
    except (OSError, RuntimeError) as error:
        return f"; its memory could not be written to {path} ({one_line(error)})"
    return f"; what lay in its memory is in {path} (for pytorch.org/memory_viz)"


def _what_fits(config: Config, world: World) -> str:
    micro_batch, accumulate = config.micro_batch_size(world.size), config.training.accumulate_steps
    free = available_bytes(world.device)
    fit = (
        micro_batch // 2
        if free is None
        else largest_micro_batch(config, world.size, free + held_bytes(world.device))
    )
    # The estimate counts neither workspaces nor fragmentation, so what has failed does not fit.
    fit = min(fit, micro_batch // 2)
    told = f"out of memory with {micro_batch} samples at a time on {world.device}"
    per_rank = micro_batch * accumulate
    parts = next(
        (n for n in range(1, per_rank + 1) if per_rank % n == 0 and per_rank // n <= fit), 0
    )
    if not parts:
        return (
            f"{told}; no sample fits by the estimate of sd-perf train --dry-run: make the model "
            "(model.*) or data.latent_size smaller, or set model.activation_checkpointing"
        )
    return (
        f"{told}; {per_rank // parts} fit by the estimate of sd-perf train --dry-run: set "
        f"--training.accumulate-steps {parts} (the same run, in more parts), or a smaller "
        "--training.global-batch-size"
    )


def largest_micro_batch(config: Config, ranks: int, available: int) -> int:
    """Samples per forward pass that `available` bytes of a rank hold, by the dry run's estimate."""
    memory = dry_run(config, ranks)["memory_bytes"]
    activations = next(size for name, size in memory.items() if name.startswith("activations"))
    per_sample = activations / config.micro_batch_size(ranks)
    return max(0, int((available - (memory["total"] - activations)) // per_sample))
