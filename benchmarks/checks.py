"""Correctness checks: an error, its budget, and whether it is within.

Every check of `gpu_acceptance` is one `Check`, a line of its correctness table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypedDict

import torch

from sd_perf.files import one_line


class Check(TypedDict):
    """One compared quantity."""

    check: str
    """what is compared, after the name of the recipe where it is of one"""
    recipe: str
    """`implementation` of the recipe that is checked; empty: the check is of no single one"""
    error: float | None
    """None: not finite"""
    budget: float
    """largest error that passes"""
    passed: bool
    note: str
    """what it is compared with, or what was raised instead"""


def make_check(
    what: str, error: float, budget: float, *, note: str = "", recipe: str = ""
) -> Check:
    """A check. An error that is not finite never passes."""
    finite = math.isfinite(error)
    return {
        "check": titled(what, recipe),
        "recipe": recipe,
        "error": error if finite else None,
        "budget": budget,
        "passed": finite and error <= budget,
        "note": note,
    }


def titled(what: str, recipe: str) -> str:
    """What is checked, after the name of the recipe if there is one."""
    return f"{recipe}: {what}" if recipe else what


def guarded(what: str, group: Callable[[], list[Check]], *, recipe: str = "") -> list[Check]:
    """The group's checks; where it raises, one red check of that name with the error as note."""
    try:
        return group()
    except Exception as error:  # a missing kernel must not hide what other checks find
        return [make_check(what, math.nan, 0.0, note=one_line(error), recipe=recipe)]


def passed(checks: Sequence[Check]) -> bool:
    """Whether there are checks and all of them passed."""
    return bool(checks) and all(check["passed"] for check in checks)


def relative_error(out: torch.Tensor, reference: torch.Tensor) -> float:
    """||out - reference|| / ||reference|| in float64, for tensors of one shape on any device."""
    reference = reference.double()
    return ((out.to(reference.device).double() - reference).norm() / reference.norm()).item()


def differing(tensors: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> int:
    """Number of elements that are not equal bit for bit, of tensors of the same shapes and dtypes.

    NaN equals NaN of the same bits, and 0 differs from -0.
    """
    pairs = zip(tensors, others, strict=True)
    return sum(int((_bits(a) != _bits(b.to(a.device))).sum()) for a, b in pairs)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().view(integers[tensor.element_size()])
