"""Delayed scaling: an FP8 tensor's scale comes from its largest magnitudes in earlier steps.

The scale is then known before a tensor is computed, so the kernel that computes it can also write
it in FP8, and only records the largest magnitude (amax) it saw. Current scaling reads the tensor a
second time instead.

The rules are those of Transformer Engine's recipe DelayedScaling (2.20, "max" of the history,
HYBRID formats). Amax is gathered over a whole step: over micro-batches, over recomputation and,
where the caller reduces `amax` with MAX, over ranks. `update_scales` then ends the step:

- the scale becomes the format's largest number / (2^MARGIN * the largest amax in the history)
- it stays where that amax is 0, infinite or NaN
- before the first update every scale is 1

Each linear layer has three slots: its input and its weight (E4M3), and its output's gradient
(E5M2). Every kernel multiplies by 1 / inverse and the matmul by inverse, so that is what is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

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
