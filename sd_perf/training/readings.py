"""What the host does without holding up the GPU: reads numbers late, collects its garbage."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch


class LateNumber:
    """A number on the device, copied to the host without waiting for it."""

    def __init__(self, number: torch.Tensor) -> None:
        """Takes the value as of now; what is queued later may overwrite the tensor."""
        self._done: torch.cuda.Event | None = None
        if number.is_cuda:
            self._host = torch.empty((), dtype=number.dtype, pin_memory=True)
            self._host.copy_(number, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()
        else:
            self._host = number.clone()

    def value(self) -> float:
        """The number; waits where the device has not come so far."""
        if self._done:
            self._done.synchronize()
        return self._host.item()


def named_range(name: str) -> AbstractContextManager[None]:
    """A range that profilers of NVIDIA GPUs show by its name (NVTX)."""
    return torch.cuda.nvtx.range(name) if torch.cuda.is_available() else contextlib.nullcontext()


@contextlib.contextmanager
def manual_garbage_collection() -> Iterator[None]:
    """Python's garbage is collected only where the block calls gc.collect, never amid a step.

    What is alive at the start, networks and all, is never searched for garbage.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
