"""What is saved of a run when another of its processes is lost."""

from __future__ import annotations

from sd_perf.errors import UserError
from sd_perf.training.trainer import Trainer


def rescue(trainer: Trainer) -> str:
    """Save the state after the last whole step, where this rank can; what there is, in words.

    On a CPU a lost rank is noticed in a collective, and a step ends with the update, after its last
    one: weights and moments are those of `trainer.samples`. A GPU may have gone on with gradients
    of half the ranks, so nothing of it is saved.
    """
    if trainer.world.is_main and trainer.world.device.type == "cpu":
        try:
            trainer.store.wait()
            trainer.save()
            trainer.store.wait()
        except UserError as error:
            return str(error)
    return f"{trainer.store.newest_in_words()}; continue with --resume"
