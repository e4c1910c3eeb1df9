"""Level op: every operator against its reference in float64, by the rule and the harness of
sd_kernels."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sd_kernels import harness
from sd_kernels.reasons import Reason
from sd_kernels.registry import all_ops
from sd_kernels.selection import reasons_against
from sd_kernels.spec import Case, OpSpec, Target
from sd_perf.tools.parity.rows import Row
from sd_perf.tools.parity.subject import Subject

SMALL_CASES = 3
"""of each operator, in the interpreter; all of them elsewhere"""


def compare_operators(subject: Subject) -> Iterator[Row]:
    """The worst output or gradient of each operator, backend and dtype, over its small and ragged
    cases."""
    for op, spec in all_ops().items():
        backend = subject.choices[op].backend
        if backend == spec.backends[-1].name:
            continue  # the reference itself
        cases = (
            spec.small_cases[:SMALL_CASES] if subject.where == "interpreter" else spec.small_cases
        )
        for dtype in _dtypes(spec, backend):
            taken = [case for case in cases if not _against(spec, backend, case, dtype)]
            if taken:
                yield _worst(subject, spec, backend, taken, dtype)


def _dtypes(spec: OpSpec, backend: str) -> list[torch.dtype]:
    """Ours in what the UNet computes in. Other people's kernels answer for their own rounding: in
    float64, where they take it, an error can only be one of how they are called."""
    ours = [dtype for dtype in spec.dtypes if dtype != torch.float16]
    takes_wide = not all(_against(spec, backend, case, torch.float64) for case in spec.small_cases)
    return [torch.float64] if takes_wide and not spec.backend(backend).ours else ours


def _against(spec: OpSpec, backend: str, case: Case, dtype: torch.dtype) -> list[Reason]:
    return reasons_against(spec.backend(backend), Target.here(), [case], dtype)


def _worst(
    subject: Subject, spec: OpSpec, backend: str, cases: list[Case], dtype: torch.dtype
) -> Row:
    function, verdicts = getattr(subject.ops, spec.name), []
    for case in cases:
        verdicts += harness.check(
            spec, backend, case, dtype, subject.device.type, function=function
        )
    sizes = [verdict for verdict in verdicts if verdict.measure != "rms"]
    largest, mean = (
        max(some, key=_used)
        for some in (sizes, [v for v in verdicts if v.measure == "rms"] or sizes)
    )
    errors = (
        largest.error,
        mean.error,
        largest.torch_error,
        mean.torch_error,
        largest.budget,
        mean.budget,
    )
    note = f"worst: {largest.output}, case {largest.case!r}"
    return Row("op", f"{spec.name} ({backend})", subject.where, largest.dtype, *errors, note)


def _used(verdict: harness.Verdict) -> float:
    """Share of the budget; a NaN is the worst of all."""
    if verdict.ok:
        return verdict.error / verdict.budget if verdict.budget else 0.0
    return (
        verdict.error / verdict.budget
        if verdict.error == verdict.error and verdict.budget
        else float("inf")
    )
