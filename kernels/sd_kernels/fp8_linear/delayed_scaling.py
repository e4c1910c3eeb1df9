"""The delayed scales of a network, which outlive a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from sd_kernels.errors import require
from sd_kernels.fp8_linear.scaling import HISTORY, SLOTS, Scales, update_scales


class DelayedScaling(torch.nn.Module):
    """The delayed scales of one network, as three flat float32 tensors for all of its layers.

    They are no part of the state dict, which holds weights alone. Kernels, `update` and
    `load_state` write them in place, so a captured graph may do all of it.
    """

    amax: torch.Tensor
    inverse: torch.Tensor
    history: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = 0

    def add_layers(self, count: int) -> int:
        """Make slots for `count` more layers, and return the number of the first of them.

        To be called while the network is built: the tensors are made anew.
        """
        first, self.layers = self.layers, self.layers + count
        slots = SLOTS * self.layers
        self.register_buffer("amax", torch.zeros(slots), persistent=False)
        self.register_buffer("inverse", torch.ones(slots), persistent=False)
        self.register_buffer("history", torch.zeros(HISTORY, slots), persistent=False)
        return first

    def of(self, first: int, count: int = 1) -> Scales:
        """The slots of `count` layers from `first` on."""
        slots = slice(SLOTS * first, SLOTS * (first + count))
        return Scales(self.inverse[slots], self.amax[slots])

    def update(self) -> None:
        """End a step: new scales from the history, without host synchronisation."""
        step = update_scales
        if self.amax.is_cuda:
            from sd_kernels.fp8_linear.delayed_kernels import (
                fp8_update_scales as step,  # needs Triton
            )
        step(self.amax, self.inverse, self.history)

    def state(self) -> dict[str, torch.Tensor]:
        """Copies of the tensors by name."""
        return {name: buffer.clone() for name, buffer in self.named_buffers()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state` gave, in place; KernelError where it is of another network."""
        buffers = dict(self.named_buffers())
        shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        takes = {name: tuple(buffer.shape) for name, buffer in buffers.items()}
        require(shapes == takes, "precision_state", f"delayed scales {shapes}", str(takes))
        for name, buffer in buffers.items():
            buffer.copy_(state[name])

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        # A change of the network's dtype must not reach the scales: as integers they are left out.
        for name, buffer in self.named_buffers():
            setattr(self, name, fn(buffer.view(torch.int32)).view(torch.float32))
        return self
