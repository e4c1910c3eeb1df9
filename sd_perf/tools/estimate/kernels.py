"""Kernels and GPUs, and how long the one takes on the other at least.

Nothing here is fitted to a training speed: rates are published or measured on single products,
copies and attentions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from sd_kernels.targets import GPU, AttentionRates

_TILES = ((128, 128), (128, 256), (256, 128))
"""outputs of a program of the big matrix kernels (CUTLASS, cuBLAS, cuDNN)"""
_SPLITS = (1, 2, 4, 8, 16, 32, 64)
"""programs that share the sum behind one output where there are fewer tiles than multiprocessors"""


class Product(NamedTuple):
    """(M, K) times (K, N), or the convolution that amounts to it."""

    M: int
    N: int
    K: int

    def seconds(self, gpu: GPU) -> float:
        """With the best tile and split: whole waves of tiles, and the parts of split sums written
        and read."""
        return min(
            self._seconds(gpu, rows, columns, split)
            for rows, columns in _TILES
            for split in _SPLITS
        )

    def _seconds(self, gpu: GPU, rows: int, columns: int, split: int) -> float:
        programs = math.ceil(self.M / rows) * math.ceil(self.N / columns) * split
        of_program = (
            2.0
            * rows
            * columns
            * math.ceil(self.K / split)
            * gpu.multiprocessors
            / gpu.full_wave_flops
        )
        parts = 8.0 * self.M * self.N * split if split > 1 else 0.0
        return math.ceil(programs / gpu.multiprocessors) * of_program + parts / gpu.bandwidth.value


@dataclass(frozen=True)
class Kernel:
    """Device memory it moves, and the arithmetic of its matrices."""

    op: str
    bytes: float
    product: Product | None = None
    attention: tuple[float, int] | None = None
    """FLOPs, and queries of a sample"""
    calls: int = 1
    backward: bool = False

    @property
    def flops(self) -> float:
        """Those of one call."""
        if self.attention:
            return self.attention[0]
        return 2.0 * math.prod(self.product) if self.product else 0.0

    def seconds(self, gpu: GPU, rates: AttentionRates) -> float:
        """One call: what takes longer, moving or computing."""
        computing = self.product.seconds(gpu) if self.product else 0.0
        if self.attention:
            flops, queries = self.attention
            computing = flops / (rates[self.backward][queries >= 4096] * 1e12)
        return max(computing, self.bytes / gpu.bandwidth.value)
