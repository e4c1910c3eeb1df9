"""The processes of a run: this rank, and small collectives that run on the CPU."""

from __future__ import annotations

import contextlib
import datetime
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sd_perf.distributed.launcher import read_place
from sd_perf.distributed.rendezvous import meet
from sd_perf.distributed.watchdog import Watchdog
from sd_perf.errors import ConfigError, UserError

Value = TypeVar("Value")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class World:
    """This process and its peers.

    The methods are collectives: every rank must call them, in the same order. They exchange flags
    and small objects and never touch a GPU; gradients are reduced elsewhere.
    """

    rank: int
    size: int
    device: torch.device
    cpu_group: Any = None
    """gloo process group; None in a world of one process"""
    watchdog: Watchdog | None = None
    """notices lost ranks; None in a world of one process"""

    def part(self) -> None:
        """Stop to care whether other ranks are there: this one has done what it does with them."""
        if self.watchdog is not None:
            self.watchdog.release()

    def lost(self) -> str:
        """Which rank is gone or silent, in words; empty while all are there."""
        return self.watchdog.lost if self.watchdog else ""

    @contextlib.contextmanager
    def losses_named(self, what_is_kept: Callable[[], str]) -> Iterator[None]:
        """RankLostError, naming the rank, for an error in the block that a lost rank caused.

        `what_is_kept` names the newest checkpoint.
        """
        if self.watchdog is None:
            yield
        else:
            with self.watchdog.named(what_is_kept):
                yield

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes the run folder."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Sum of each value over all ranks, computed in float64."""
        if self.size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.cpu_group)
        return total.tolist()

    def max(self, value: int) -> int:
        """The largest value of any rank."""
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
        """Call a function on every rank; returns each rank's own value.

        Where it raises a UserError on any rank, rank 0 raises that error and every other rank exits
        with status 2. Without this, a rank that fails alone would leave the others waiting for it
        in their next collective. The function must call no collective itself.
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
            self.part()
            raise (failure or UserError(f"rank {rank}: {told}")) if self.is_main else SystemExit(2)
        return value

    def on_main(self, function: Callable[[], Value]) -> Value:
        """Call a function on rank 0 alone; returns its value on every rank.

        Where it raises a UserError, rank 0 raises it and every other rank exits with status 2. The
        value is pickled to reach the other ranks.
        """
        if self.size == 1:
            return function()
        box: list[Any] = [self.together(lambda: function() if self.is_main else None)]
        dist.broadcast_object_list(box, src=0, group=self.cpu_group)
        return box[0]


def start_world(
    device_choice: str,
    join_seconds: float = 60,
    silence_seconds: float = 60,
    collective_seconds: float = 1800,
) -> World:
    """Join the processes that torchrun or Slurm started, or be a world of one process.

    `device_choice` is "auto", "cpu" or "cuda". A collective that takes longer than
    `collective_seconds` raises RuntimeError, see `is_overdue`. Raises ConfigError for "cuda" where
    torch sees no GPU, for a launcher's variables that cannot be, and where a process has not come
    in time.
    """
    place = read_place()
    device = choose_device(device_choice, place.local_rank)
    if place.size == 1:
        return World(rank=0, size=1, device=device)
    store = meet(place, join_seconds)
    watchdog = Watchdog(place, silence_seconds)
    watchdog.start(store)
    # With GPUs there are two groups: NCCL for gradients, gloo for the collectives of World.
    patience = datetime.timedelta(seconds=collective_seconds)
    joined: dict[str, Any] = {
        "store": store,
        "rank": place.rank,
        "world_size": place.size,
        "timeout": patience,
    }
    if device.type == "cuda":
        # Of high priority, so that the computation that it runs beside does not starve it.
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        dist.init_process_group("nccl", device_id=device, pg_options=options, **joined)
    else:
        dist.init_process_group("gloo", **joined)
    cpu_group: Any = dist.group.WORLD
    if device.type == "cuda":
        cpu_group = dist.new_group(backend="gloo", timeout=patience)
    return World(place.rank, place.size, device, cpu_group, watchdog)


def is_overdue(error: BaseException) -> bool:
    """Whether an error of torch is that of a collective which took longer than it may."""
    return isinstance(error, RuntimeError) and "timed out" in str(error).lower()


def stop_world(world: World | None = None) -> None:
    """Leave the process group, where there is one. Lost ranks could not be left in order."""
    lost = world is not None and world.watchdog is not None and world.watchdog.lost
    if dist.is_initialized() and not lost:
        dist.destroy_process_group()


def choose_device(choice: str, local_rank: int) -> torch.device:
    """The device of this rank; makes a GPU the current one."""
    has_cuda = torch.cuda.is_available()
    if choice == "cuda" and not has_cuda:
        raise ConfigError(
            "training.device: 'cuda' cannot be used; torch sees no GPU here (see sd-perf doctor)"
        )
    if choice == "cpu" or not has_cuda:
        return torch.device("cpu")
    # A launcher may show each process a GPU of its own, which is then number 0.
    gpus = torch.cuda.device_count()
    if local_rank >= gpus > 1:
        raise ConfigError(
            f"LOCAL_RANK: {local_rank} has no GPU of its own, {gpus} are here; start at most "
            "as many processes on a machine as it has GPUs"
        )
    device = torch.device("cuda", local_rank if gpus > 1 else 0)
    torch.cuda.set_device(device)
    return device
