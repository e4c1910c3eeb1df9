"""Published rates of the benchmark, and the share of the estimate that they reached.

An estimate is the most that a step could do. How much of it real steps reach is taken from the best
MLPerf submissions: their published rate divided by the estimate of their own way of running the
step. Nothing else is known before a step has run on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from sd_kernels.targets import GPU, named


class Submission(NamedTuple):
    """One MLPerf entry on a single node, from its result logs."""

    gpu: str
    batch: int
    """samples per GPU"""
    ranks: int
    """GPUs that share the optimizer's state"""
    rate: float
    """samples per second and GPU"""


BEST = (
    Submission("h100", batch=64, ranks=4, rate=145.0),  # Dell XE8640, v4.1
    Submission("h100", batch=32, ranks=8, rate=137.3),  # NVIDIA eos, v4.1
    Submission("h200", batch=64, ranks=8, rate=149.5),  # HPE XD670, v5.0
    Submission("h200", batch=32, ranks=8, rate=145.0),  # Lenovo SR680a V3, v4.1
    Submission("b200", batch=32, ranks=8, rate=274.2),  # Dell XE9680L, v5.0
)
"""the best entry of each GPU and batch, in mlcommons/training_results_v4.1 and _v5.0"""


def reached_shares(
    gpu: GPU, estimated: Callable[[str, int, int], float]
) -> tuple[float, float] | None:
    """Least and greatest share of the estimate that entries on this kind of GPU reached.

    `estimated(gpu, batch, ranks)` is the estimate of the submission's way in samples per second.
    GPUs of one compute capability are one kind. None where no entry is known.
    """
    shares = [
        entry.rate / estimated(entry.gpu, entry.batch, entry.ranks)
        for entry in BEST
        if named(entry.gpu).capability == gpu.capability
    ]
    return (min(shares), max(shares)) if shares else None
