"""What the draws of a sample are for; the draws themselves are `sd_kernels.philox`, the oracle of
fused kernels."""

from __future__ import annotations

from enum import IntEnum

from sd_kernels.philox import normal, philox, philox_4x32, uniform_integers

__all__ = ["Stream", "normal", "philox", "philox_4x32", "uniform_integers"]


class Stream(IntEnum):
    """What a draw is for; streams of one sample are independent."""

    TIMESTEP = 0
    NOISE = 1
    MOMENTS = 2
    SAMPLER = 3
    ORDER = 4
    SYNTHETIC = 5
