"""The learning rate of every optimizer step: a linear warm-up, then constant or a decay."""

from __future__ import annotations

import math

from sd_perf.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, full_rate: float, step: int) -> float:
    """Rate of optimizer step `step`, counted from 0.

    The first step has warmup_start x full_rate; warmup_steps later the rate is full_rate. With
    decay_steps it then falls for so many steps to decay_end x full_rate, and stays there: along a
    line, or as (1 + cos(pi progress)) / 2 (Loshchilov and Hutter, arXiv 1608.03983, equation 5).
    The rate depends on the step alone, not on where the run ends. A resumed run has the same rates,
    and one with a larger max_samples trains on at the last rate.
    """
    if step < config.warmup_steps:
        return full_rate * _between(config.warmup_start, 1.0, step / config.warmup_steps)
    if config.decay_steps == 0:
        return full_rate
    progress = min(1.0, (step - config.warmup_steps) / config.decay_steps)
    if config.decay_shape == "cosine":
        progress = (1.0 - math.cos(math.pi * progress)) / 2.0
    return full_rate * _between(1.0, config.decay_end, progress)


def _between(first: float, last: float, progress: float) -> float:
    return first + (last - first) * progress
