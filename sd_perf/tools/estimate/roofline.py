"""One kernel, and the least time that it takes on a GPU: its bytes or its arithmetic.

Nothing here is fitted to a training speed: the rates of `sd_kernels.targets` are published, or
measured on single matmuls, copies and attentions. docs/performance.md describes the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from sd_kernels.spec import Matmul
from sd_kernels.targets import GPU, AttentionRates

_TILES = ((128, 128), (128, 256), (256, 128))
"""outputs of a program of the big matmul kernels (CUTLASS, cuBLAS, cuDNN)"""
_SPLITS = (1, 2, 4, 8, 16, 32, 64)
"""programs that share the sum behind one output where there are fewer tiles than multiprocessors"""
_LONG = 4096
"""queries from which an attention counts at the rate of 4096 tokens; below, at that of 1024"""


@dataclass(frozen=True)
class AttentionWork:
    """FLOPs of an attention kernel, and the queries of a sample, which decide its rate."""

    flops: float
    queries: int


@dataclass(frozen=True)
class Kernel:
    """A kernel: the bytes that it moves, and the matmul or attention that it computes."""

    op: str
    bytes: float
    """read and written"""
    matmul: Matmul | None = None
    attention: AttentionWork | None = None
    calls: int = 1
    backward: bool = False

    @property
    def flops(self) -> float:
        """FLOPs of one call."""
        if self.attention:
            return self.attention.flops
        return self.matmul.flops if self.matmul else 0.0

    def seconds(self, gpu: GPU, rates: AttentionRates) -> float:
        """One call: the longer of moving and computing, which overlap."""
        computing = matmul_seconds(self.matmul, gpu) if self.matmul else 0.0
        if self.attention:
            short, long = rates.backward if self.backward else rates.forward
            # Shorter ones than 1024 are 2 % of attention's arithmetic in the benchmark.
            tflops = long if self.attention.queries >= _LONG else short
            computing = self.attention.flops / (tflops * 1e12)
        return max(computing, self.bytes / gpu.bandwidth.value)


def matmul_seconds(matmul: Matmul, gpu: GPU) -> float:
    """Least seconds of a matmul, over all tiles and splits: libraries try to find the best."""
    return min(
        _tiled_seconds(matmul, gpu, tile=tile, split=split) for tile in _TILES for split in _SPLITS
    )


def _tiled_seconds(matmul: Matmul, gpu: GPU, tile: tuple[int, int], split: int) -> float:
    """Seconds with one tile and split. A wave of programs takes its time even if not full."""
    rows, columns = tile
    programs = math.ceil(matmul.M / rows) * math.ceil(matmul.N / columns) * split
    # A program has one multiprocessor: 2 * rows * columns * K FLOPs at its share of the GPU's rate.
    flops = 2.0 * rows * columns * math.ceil(matmul.K / split)
    program_seconds = flops * gpu.multiprocessors / gpu.full_wave_flops
    waves = math.ceil(programs / gpu.multiprocessors)
    # Split sums leave float32 parts, which are written once and read once: 8 bytes each.
    part_bytes = 8.0 * matmul.M * matmul.N * split if split > 1 else 0.0
    return waves * program_seconds + part_bytes / gpu.bandwidth.value
