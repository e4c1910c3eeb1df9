"""Kernels and GPUs, and how long the one takes on the other at least.

Nothing here is fitted to a training speed: rates are published or measured on single products,
copies and attentions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

_TILES = ((128, 128), (128, 256), (256, 128))
"""outputs of a program of the big matrix kernels (CUTLASS, cuBLAS, cuDNN)"""
_SPLITS = (1, 2, 4, 8, 16, 32, 64)
"""programs that share the sum behind one output where there are fewer tiles than multiprocessors"""


class Rates(NamedTuple):
    """TFLOP/s of attention at head dim 64, not causal, at 1024 and at 4096 tokens."""

    forward: tuple[float, float]
    backward: tuple[float, float]


_FLASH_2 = Rates((306, 321), (238, 279))
_CUDNN = Rates((373, 408), (348, 417))
_FLASH_3 = Rates((392, 476), (363, 453))
_AMPERE = Rates((228, 228), (197, 197))
_BLACKWELL = Rates((619, 825), (619, 825))


@dataclass(frozen=True)
class GPU:
    """What bounds a kernel. docs/performance.md has the sources."""

    name: str
    multiprocessors: int
    tflops: float
    """of bfloat16 products with fp32 sums, all multiprocessors busy"""
    bandwidth: float
    """bytes per second of a large copy, read and written"""
    memory: float
    """bytes"""
    attention: dict[str, Rates]
    """by way of working"""


# 798 TFLOP/s were measured on 8192^3, which fills 15.5 of its 16 waves of 132 programs.
_HOPPER: dict[str, Any] = {
    "multiprocessors": 132,
    "tflops": 798 * 16 / (2048 / 132),
    "attention": {"plain": _FLASH_2, "submission": _CUDNN, "fused": _FLASH_3},
}
GPUS = {
    "a100": GPU(
        "A100 80 GB",
        108,
        312,
        2.0e12,
        80e9,
        dict.fromkeys(("plain", "submission", "fused"), _AMPERE),
    ),
    "h100": GPU("H100 80 GB", bandwidth=3.0e12, memory=80e9, **_HOPPER),
    "h200": GPU("H200 141 GB", bandwidth=4.3e12, memory=141e9, **_HOPPER),
    "b200": GPU(
        "B200 180 GB",
        148,
        2250,
        8.0e12,
        180e9,
        {"plain": Rates((359, 307), (281, 315)), "submission": _BLACKWELL, "fused": _BLACKWELL},
    ),
}


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
            / (gpu.tflops * 1e12)
        )
        parts = 8.0 * self.M * self.N * split if split > 1 else 0.0
        return math.ceil(programs / gpu.multiprocessors) * of_program + parts / gpu.bandwidth


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

    def seconds(self, gpu: GPU, way: str) -> float:
        """One call: what takes longer, moving or computing."""
        computing = self.product.seconds(gpu) if self.product else 0.0
        if self.attention:
            flops, queries = self.attention
            computing = flops / (gpu.attention[way][self.backward][queries >= 4096] * 1e12)
        return max(computing, self.bytes / gpu.bandwidth)
