"""Delayed scaling: an FP8 tensor's scale comes from its largest magnitudes in earlier steps.

The scale is then known before a tensor is computed, so the kernel that computes it can also write
it in FP8, and only records the largest magnitude (amax) it saw. Current scaling reads the tensor a
second time instead.

The rules are those of Transformer Engine's recipe DelayedScaling (2.20, "max" of the history,
HYBRID formats). Amax is gathered over a whole step: over micro-batches, over recomputation and,
where the caller reduces `amax` with MAX, over ranks. `update` then ends the step:

- the scale becomes the format's largest number / (2^MARGIN * the largest amax in the history)
- it stays where that amax is 0, infinite or NaN
- before the first update every scale is 1

Each linear layer has three slots: its input and its weight (E4M3), and its output's gradient
(E5M2). Every kernel multiplies by 1 / inverse and the matmul by inverse, so that is what is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from sd_kernels.errors import require

FORMATS = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
"""largest finite number of each format: of values and weights, and of gradients"""
FORWARD, GRADIENT = FORMATS
SLOTS = 3
"""tensors of a layer that are rounded"""
INPUT, WEIGHT, GRAD = range(SLOTS)
HISTORY = 16
"""steps over whose largest magnitudes delayed scaling takes the maximum. Transformer Engine's
default is 1024; with 16 an outlier early in training is soon forgotten"""
MARGIN = 0
"""powers of two between the largest magnitude in the history and the format's largest number"""
SMALLEST = torch.finfo(torch.float32).tiny
"""least inverse scale: a smaller one would have no finite scale"""


class Scales(NamedTuple):
    """The slots of one layer or of adjacent layers: views of the network's tensors."""

    inverse: torch.Tensor
    """(SLOTS * layers,) float32: FP8 numbers times this are the tensor's"""
    amax: torch.Tensor
    """(SLOTS * layers,) float32: largest magnitudes of this step so far, written by kernels"""

    def layer(self, index: int) -> Scales:
        """The slots of one of these layers."""
        slots = slice(SLOTS * index, SLOTS * (index + 1))
        return Scales(self.inverse[slots], self.amax[slots])


def update_scales(amax: torch.Tensor, inverse: torch.Tensor, history: torch.Tensor) -> None:
    """End a step in plain torch, in place: amax moves into the history and becomes 0.

    amax and inverse are (slots,), history is (HISTORY, slots), newest first; all float32.
    """
    history.copy_(torch.cat((amax[None], history[:-1])))
    largest = history.amax(0)
    is_grad = torch.arange(len(amax), device=amax.device) % SLOTS == GRAD
    limit = torch.where(is_grad, FORMATS[GRADIENT], FORMATS[FORWARD])
    wanted = (largest * 2.0**MARGIN / limit).clamp_min(SMALLEST)
    # The comparison is false for NaN.
    known = (largest > 0) & (largest < float("inf"))
    inverse.copy_(torch.where(known, wanted, inverse))
    amax.zero_()


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
            from sd_kernels.fp8_linear.delayed import fp8_update_scales as step  # needs Triton
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
