"""A line of the parity report: how far the fast path is from the truth, how far plain torch is, and
what is allowed.

The truth is the plain path in float64. The error may be twice what plain torch makes at the same
dtype, and a floor of four ulp of float32 is always allowed, since plain torch is sometimes exact by
chance (the rule of `sd_kernels.harness`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sd_kernels.harness import FLOOR

Tensors = Sequence[torch.Tensor]
Errors = tuple[float, float]
"""largest and root mean square"""
FACTOR = 2.0
"""times plain torch's own error that is allowed"""


@dataclass(frozen=True)
class Row:
    """One comparison. Errors are relative to the truth's own root mean square and largest
    number."""

    level: str
    """op, block, unet, grad, step, trajectory or world"""
    name: str
    where: str
    """interpreter: tiny shapes in Triton's interpreter; structure: the config's network on a CPU;
    gpu"""
    dtype: str
    max_error: float
    rms_error: float
    torch_max: float
    """plain torch's own, at the same dtype"""
    torch_rms: float
    max_budget: float
    rms_budget: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """False also where an error is NaN."""
        return self.max_error <= self.max_budget and self.rms_error <= self.rms_budget

    def as_dict(self) -> dict[str, Any]:
        """As JSON takes it; `ok` last. Numbers that JSON has no word for are words."""
        row = {key: _json_number(value) for key, value in asdict(self).items()}
        return {**row, "ok": self.ok}


def _json_number(value: Any) -> Any:
    is_odd = isinstance(value, float) and (value != value or abs(value) == float("inf"))
    return str(value) if is_odd else value


def errors(ours: Tensors, truth: Tensors) -> Errors:
    """Of each tensor relative to its own norm, the worst and the mean square of all."""
    largest: list[torch.Tensor] = []
    squares: list[torch.Tensor] = []
    for value, exact in zip(ours, truth, strict=True):
        wide = exact.double()
        difference = value.double() - wide
        for norm, kept in ((float("inf"), largest), (2.0, squares)):
            scale = torch.linalg.vector_norm(wide, norm).clamp_min(1e-30)
            kept.append(torch.linalg.vector_norm(difference, norm) / scale)
    return torch.stack(largest).max().item(), torch.stack(squares).square().mean().sqrt().item()


def judged(
    level: str,
    name: str,
    where: str,
    dtype: str,
    ours: Errors,
    plain: Sequence[Errors],
    note: str = "",
) -> Row:
    """The row of the fast path's errors and of plain torch's, of which the worst is what it makes
    at this dtype."""
    torch_max, torch_rms = (max(values) for values in zip(*plain, strict=True))
    budgets = FACTOR * torch_max + FLOOR, FACTOR * torch_rms + FLOOR
    return Row(level, name, where, dtype, *ours, torch_max, torch_rms, *budgets, note)


def compared(
    level: str,
    name: str,
    where: str,
    dtype: str,
    ours: Tensors,
    plain: Sequence[Tensors],
    truth: Tensors,
) -> Row:
    """`judged` of results in this dtype, from the fast path and from plain torch, by their errors
    in float64."""
    return judged(
        level, name, where, dtype, errors(ours, truth), [errors(values, truth) for values in plain]
    )


def exact(level: str, name: str, where: str, dtype: str, different: float, note: str = "") -> Row:
    """The row of what must be equal: `different` is the share that is not."""
    return Row(level, name, where, dtype, different, different, 0.0, 0.0, 0.0, 0.0, note)
