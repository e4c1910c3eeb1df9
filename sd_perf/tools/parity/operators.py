"""Level op: every operator against its reference in float64, with the harness of sd_kernels."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from sd_kernels import harness
from sd_kernels.registry import all_ops
from sd_kernels.selection import reasons_against
from sd_kernels.spec import Backend, Case, OpSpec, Target
from sd_perf.tools.parity.comparison import Comparison, Errors
from sd_perf.tools.parity.parity_case import ParityCase

INTERPRETED_CASES = 3
"""small cases of each operator that the interpreter, which is slow, takes; all of them elsewhere"""


def compare_operators(case: ParityCase) -> Iterator[Comparison]:
    """For each operator and dtype, the output or gradient that is closest to its limit.

    The operator's small cases are tried, among them ragged ones. Operators that run the reference
    itself are left out.
    """
    for op, spec in all_ops().items():
        backend = spec.backend(case.choices[op].backend)
        if backend is spec.backends[-1]:
            continue  # the reference
        limit = INTERPRETED_CASES if case.where == "interpreter" else None
        for dtype in _dtypes(spec, backend):
            taken = [small for small in spec.small_cases[:limit] if _takes(backend, small, dtype)]
            if taken:
                yield _closest_to_limit(case, spec, backend, taken, dtype)


def _dtypes(spec: OpSpec, backend: Backend) -> list[torch.dtype]:
    """Our kernels are compared in the dtypes of the UNet, other people's in float64.

    Those answer for their own rounding. In float64, where they take it, an error can only come
    from how they are called.
    """
    takes_wide = any(_takes(backend, small, torch.float64) for small in spec.small_cases)
    if takes_wide and not backend.ours:
        return [torch.float64]
    return [dtype for dtype in spec.dtypes if dtype != torch.float16]


def _takes(backend: Backend, small: Case, dtype: torch.dtype) -> bool:
    return not reasons_against(backend, Target.here(), [small], dtype)


def _closest_to_limit(
    case: ParityCase, spec: OpSpec, backend: Backend, smalls: list[Case], dtype: torch.dtype
) -> Comparison:
    function, verdicts = getattr(case.ops, spec.name), []
    for small in smalls:
        verdicts += harness.check(
            spec, backend.name, small, dtype, device=case.device.type, function=function
        )
    # Outputs that must be equal, or are missing, have one measure, which stands in for both.
    by_max = [verdict for verdict in verdicts if verdict.measure != "rms"]
    by_rms = [verdict for verdict in verdicts if verdict.measure == "rms"] or by_max
    largest, mean = max(by_max, key=_share_of_budget), max(by_rms, key=_share_of_budget)
    return case.comparer("op", largest.dtype).judged(
        f"{spec.name} ({backend.name})",
        error=Errors(max=largest.error, rms=mean.error),
        torch_error=Errors(max=largest.torch_error, rms=mean.torch_error),
        allowed=Errors(max=largest.budget, rms=mean.budget),
        note=f"worst: {largest.output}, case {largest.case!r}",
    )


def _share_of_budget(verdict: harness.Verdict) -> float:
    """Infinite, thus the worst of all, for a NaN and for any error where none is allowed."""
    if verdict.ok:
        return verdict.error / verdict.budget if verdict.budget else 0.0
    is_number = not math.isnan(verdict.error)
    return verdict.error / verdict.budget if is_number and verdict.budget else math.inf
