"""How the ranks of the fast network share gradients and the optimizer's state.

A strategy exchanges one range of a flat buffer at a time (`training.flat.Bucket`). Its collectives
are asynchronous: each returns a handle whose `wait` makes the current stream wait on a GPU, and the
caller on a CPU. NCCL runs them on a stream of its own, beside the computation, and a CUDA graph
records both. A new strategy is a class here, listed in `STRATEGIES`; see docs/training_step.md.

Shape letter: N elements of a flat buffer.
"""

from __future__ import annotations

from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from sd_perf.distributed.world import World

# torch 2.13 renamed these two and warns of the old names.
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)


class Handle(Protocol):
    """A collective under way."""

    def wait(self) -> object:
        """Let what comes next see its result."""
        ...


class Strategy:
    """One process: nothing to exchange. The base of the others."""

    divides_state = False
    """whether each rank keeps and updates only its share of weights and moments"""

    def __init__(self, world: World) -> None:
        self.world = world

    @property
    def share(self) -> tuple[int, int]:
        """(rank, ranks): which part of the optimizer's state this rank keeps, of how many."""
        return (self.world.rank, self.world.size) if self.divides_state else (0, 1)

    def reduce(self, gradients: Tensor) -> Handle | None:
        """Begin to sum a bucket's gradients (N,) over ranks, in place.

        Where state is divided, the sum is needed in this rank's share alone.
        """

    def gather(self, weights: Tensor) -> Handle | None:
        """Begin to fill a bucket's weights (N,) from the shares of all ranks."""

    def largest(self, magnitudes: Tensor) -> Handle | None:
        """Begin to take the largest of every magnitude over ranks, in place."""
        if self.world.size == 1:
            return None
        return dist.all_reduce(magnitudes, dist.ReduceOp.MAX, async_op=True)


class AllReduce(Strategy):
    """Every rank has all gradients and updates all weights, as torch's DDP does."""

    def reduce(self, gradients: Tensor) -> Handle | None:
        return dist.all_reduce(gradients, async_op=True)


class ShardedOptimizer(Strategy):
    """Each rank updates its share of the weights, and keeps moments and remainders of it alone.

    ZeRO stage 1 (Rajbhandari et al. 2020, arXiv 1910.02054), as Megatron's distributed optimizer
    has it: reduce-scatter and all-gather move as much as one all-reduce, and the update of a rank
    reads and writes 1/ranks of the state.
    """

    divides_state = True

    def reduce(self, gradients: Tensor) -> Handle | None:
        return _reduce_scatter(self._mine(gradients), gradients, async_op=True)

    def gather(self, weights: Tensor) -> Handle | None:
        return _all_gather(weights, self._mine(weights), async_op=True)

    def _mine(self, bucket: Tensor) -> Tensor:
        """This rank's share of a bucket: equal parts, in rank order."""
        return bucket.chunk(self.world.size)[self.world.rank]


STRATEGIES = {"ddp": AllReduce, "zero1": ShardedOptimizer}
"""by the name in `training.strategy`"""


def build_strategy(name: str, world: World) -> Strategy:
    """The strategy of that name; "auto" divides the state wherever there are several ranks."""
    if world.size == 1:
        return Strategy(world)
    return STRATEGIES["zero1" if name == "auto" else name](world)
