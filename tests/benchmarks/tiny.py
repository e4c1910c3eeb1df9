"""What tests of the benchmarks share: small networks, a clock that is told the time."""

from __future__ import annotations

import dataclasses

from torch.nn.attention import SDPBackend

from benchmarks.gpu_device import Rehearsal
from benchmarks.gpu_workload import AUTOCAST, FP32, MASTERS, PlainWorkload, Recipe
from benchmarks.timing import Clock

H100 = "NVIDIA H100 80GB HBM3"
TINY = Rehearsal.full.config
SIZES = {"latent_size": 8, "context_tokens": 5}
RECIPES = [
    dataclasses.replace(recipe, attention=SDPBackend.MATH) for recipe in (FP32, AUTOCAST, MASTERS)
]
THROUGHPUT = {
    "samples_per_second": 100.0,
    "ms_per_sample": 10.0,
    "peak_memory_bytes": 2**30,
    "loss_start": 1.0,
    "loss_end": 0.9,
}
"""measured columns of a row of gpu_throughput"""


class FakeClock:
    """A clock whose intervals are given."""

    def __init__(self, milliseconds: list[float]) -> None:
        self._milliseconds = milliseconds
        self._marks = 0

    def mark(self) -> None:
        self._marks += 1

    def intervals(self) -> list[float]:
        return self._milliseconds[: self._marks - 1]


class FakeDevice(Rehearsal):
    """A CPU on which every interval takes so many milliseconds."""

    def __init__(self, milliseconds: float) -> None:
        self._milliseconds = milliseconds

    def clock(self) -> Clock:
        return FakeClock([self._milliseconds] * 1000)


def tiny_workload(recipe: Recipe) -> PlainWorkload:
    return PlainWorkload(recipe, TINY, batch=2, device="cpu", **SIZES)
