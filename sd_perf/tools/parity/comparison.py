"""How far the fast path is from the truth, how far plain torch is, and how far it may be.

The truth is the plain path in float64. Plain torch is the plain path at the dtype of the fast one.
The rule is that of `sd_kernels.harness`: an error may be twice plain torch's own. Four ulp of
float32 are always allowed, since plain torch is sometimes exact by chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from sd_kernels.harness import FLOOR
from sd_perf.runs.parity_record import Level, Where

Tensors = Sequence[torch.Tensor]
FACTOR = 2.0
"""how many times plain torch's own error is allowed"""


@dataclass(frozen=True)
class Errors:
    """Two measures of one deviation, both relative to the same measure of the truth."""

    max: float
    """of the largest deviation"""
    rms: float
    """of the root mean square"""

    @classmethod
    def of_one_number(cls, error: float) -> Errors:
        """The errors of a single number: its largest deviation is also its root mean square."""
        return cls(max=error, rms=error)

    def allows(self, error: Errors) -> bool:
        """Whether both measures of `error` are within these limits; a NaN is not."""
        return error.max <= self.max and error.rms <= self.rms


def relative_errors(values: Tensors, truth: Tensors) -> Errors:
    """Errors of several tensors, each relative to its own norm.

    `values` and `truth` have the same shapes; differences are taken in float64. `max` is the worst
    of all tensors, `rms` the root mean square over them.
    """
    largest: list[torch.Tensor] = []
    squares: list[torch.Tensor] = []
    for value, exact in zip(values, truth, strict=True):
        wide = exact.double()
        difference = value.double() - wide
        for norm, kept in ((math.inf, largest), (2.0, squares)):
            # A truth of zeros has no scale: any deviation from it is far too large.
            scale = torch.linalg.vector_norm(wide, norm).clamp_min(1e-30)
            kept.append(torch.linalg.vector_norm(difference, norm) / scale)
    return Errors(
        max=torch.stack(largest).max().item(),
        rms=torch.stack(squares).square().mean().sqrt().item(),
    )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One line of the report."""

    level: Level
    name: str
    """what was compared"""
    where: Where | Literal["all"]
    """all: of the record as a whole"""
    dtype: str
    """number format of the fast path and of plain torch"""
    error: Errors
    """of the fast path"""
    torch_error: Errors
    """of plain torch at the same dtype"""
    allowed: Errors
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether the error is allowed; False also where it is NaN."""
        return self.allowed.allows(self.error)

    def as_dict(self) -> dict[str, Any]:
        """A row of `parity.json`. NaN and infinity, which JSON has no number for, are words."""
        numbers = {
            "max_error": self.error.max,
            "rms_error": self.error.rms,
            "torch_max": self.torch_error.max,
            "torch_rms": self.torch_error.rms,
            "max_budget": self.allowed.max,
            "rms_budget": self.allowed.rms,
        }
        return {
            "level": self.level,
            "name": self.name,
            "where": self.where,
            "dtype": self.dtype,
            **{
                key: value if math.isfinite(value) else str(value) for key, value in numbers.items()
            },
            "note": self.note,
            "ok": self.ok,
        }


@dataclass(frozen=True, kw_only=True)
class Comparer:
    """Makes the comparisons of one level at one dtype, so that calls say only what differs."""

    level: Level
    where: Where | Literal["all"]
    dtype: str

    def tensors(
        self, name: str, *, fast: Tensors, torch_results: Sequence[Tensors], truth: Tensors
    ) -> Comparison:
        """Compare results of the fast path with one or more results of plain torch.

        A result is a list of tensors; all have the same shapes, and `truth` is in float64.
        """
        return self.errors(
            name,
            fast=relative_errors(fast, truth),
            torch_errors=[relative_errors(result, truth) for result in torch_results],
        )

    def errors(
        self,
        name: str,
        *,
        fast: Errors,
        torch_errors: Sequence[Errors],
        limit_max: bool = True,
        note: str = "",
    ) -> Comparison:
        """Compare errors that were measured before; the worst of `torch_errors` counts.

        With `limit_max` False the root mean square alone decides. A NaN is wrong even so.
        """
        worst = Errors(
            max=max(error.max for error in torch_errors),
            rms=max(error.rms for error in torch_errors),
        )
        allowed = Errors(
            max=FACTOR * worst.max + FLOOR if limit_max else math.inf,
            rms=FACTOR * worst.rms + FLOOR,
        )
        return self.judged(name, error=fast, torch_error=worst, allowed=allowed, note=note)

    def equal(self, name: str, *, different: float, note: str = "") -> Comparison:
        """Compare what must be equal: `different` is the share of elements that are not."""
        zero = Errors.of_one_number(0.0)
        error = Errors.of_one_number(different)
        return self.judged(name, error=error, torch_error=zero, allowed=zero, note=note)

    def judged(
        self, name: str, *, error: Errors, torch_error: Errors, allowed: Errors, note: str = ""
    ) -> Comparison:
        """The comparison with limits that another rule has set."""
        return Comparison(
            level=self.level,
            name=name,
            where=self.where,
            dtype=self.dtype,
            error=error,
            torch_error=torch_error,
            allowed=allowed,
            note=note,
        )
