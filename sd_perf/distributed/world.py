"""The processes of a run: who this rank is, and the small agreements ranks make through the CPU."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sd_perf.errors import ConfigError, UserError

Value = TypeVar("Value")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class World:
    """This process among its peers. `cpu_group` carries flags and small objects and never touches a
    GPU."""

    rank: int
    size: int
    device: torch.device
    cpu_group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the run folder."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Sum of each value over all ranks, in float64."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.cpu_group)
        return total.tolist()

    def max(self, value: int) -> int:
        """Largest value of any rank."""
        if self.size == 1:
            return value
        largest = torch.tensor(value)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.cpu_group)
        return int(largest)

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in rank order."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    def together(self, function: Callable[[], Value]) -> Value:
        """The function's value on each rank; where one raises a UserError, rank 0 raises it and
        every rank leaves.

        A rank that left alone would let the others wait for it in their next collective. The
        function must make no agreements of its own.
        """
        if self.size == 1:
            return function()
        failure: UserError | None = None
        try:
            value = function()
        except UserError as error:
            _log.info("this rank failed", exc_info=error)
            failure = error
        if self.max(int(failure is not None)):
            rank, told = next(
                (rank, error) for rank, error in enumerate(self.gather(failure)) if error
            )
            raise (failure or UserError(f"rank {rank}: {told}")) if self.is_main else SystemExit(2)
        return value

    def on_main(self, function: Callable[[], Value]) -> Value:
        """The function's value, computed by rank 0 alone; where that raises a UserError, every rank
        leaves with 2."""
        if self.size == 1:
            return function()
        box: list[Any] = [self.together(lambda: function() if self.is_main else None)]
        dist.broadcast_object_list(box, src=0, group=self.cpu_group)
        return box[0]


def start_world(device_choice: str) -> World:
    """Join the processes that torchrun started (RANK, WORLD_SIZE, LOCAL_RANK), or be the only
    one."""
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = _device(device_choice, int(os.environ.get("LOCAL_RANK", "0")))
    if size == 1:
        return World(rank=0, size=1, device=device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    cpu_group = dist.new_group(backend="gloo") if device.type == "cuda" else dist.group.WORLD
    return World(rank, size, device, cpu_group)


def stop_world() -> None:
    """Leave the processes' group, where there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _device(choice: str, local_rank: int) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if choice == "cuda" and not has_cuda:
        raise ConfigError(
            "training.device: 'cuda' cannot be used; torch sees no GPU here (see sd-perf doctor)"
        )
    if choice == "cpu" or not has_cuda:
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)
