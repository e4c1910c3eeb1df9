"""How far 16-bit numbers are from what they were rounded from, over a shard or a set."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sd_perf.files import misfit


@dataclass
class RoundingError:
    """How far stored float16 numbers are from the float32 ones, over all that were added."""

    numbers: float = 0.0
    """sum of squares of the float32 numbers"""
    errors: float = 0.0
    """sum of squares of the differences"""
    worst: float = 0.0
    """largest difference"""

    def add(self, exact: np.ndarray, stored: np.ndarray) -> None:
        exact = exact.astype(np.float64)
        error = stored.astype(np.float64) - exact
        self.numbers += float(np.square(exact).sum())
        self.errors += float(np.square(error).sum())
        self.worst = max(self.worst, float(np.abs(error).max(initial=0)))

    def merge(self, other: RoundingError) -> None:
        self.numbers += other.numbers
        self.errors += other.errors
        self.worst = max(self.worst, other.worst)

    @property
    def relative(self) -> float:
        """Root mean square of the differences over that of the numbers."""
        return math.sqrt(self.errors / self.numbers) if self.numbers else 0.0

    def __str__(self) -> str:
        if not self.numbers:
            return "none"
        return f"{self.relative:.1e} of their root mean square, at worst {self.worst:.1e}"


_ERROR = {"numbers": float, "errors": float, "worst": float}
_FACTS = {"samples": int, "bad": int, "moments": _ERROR, "context": _ERROR}


@dataclass
class Encoded:
    """What was measured while shards were encoded."""

    samples: int = 0
    """including bad ones"""
    bad: int = 0
    """samples that could not be encoded, whose moments are NaN"""
    moments: RoundingError = field(default_factory=RoundingError)
    context: RoundingError = field(default_factory=RoundingError)

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Encoded:
        """From `Layout.facts`, which are `dataclasses.asdict` of it; else ValueError."""
        if fault := misfit(facts, _FACTS):
            raise ValueError(fault)
        errors = [
            RoundingError(*(facts[name][key] for key in _ERROR)) for name in ("moments", "context")
        ]
        return cls(facts["samples"], facts["bad"], *errors)

    def merge(self, other: Encoded) -> None:
        self.samples += other.samples
        self.bad += other.bad
        self.moments.merge(other.moments)
        self.context.merge(other.context)
