"""Parity of kernels on the device that times them: outputs and gradients against float64."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch

from benchmarks.kernel_cases import COMPILED, Candidate
from sd_kernels import harness
from sd_kernels.spec import Case, Function, OpSpec
from sd_perf.tools.results import Parity

MOST_BYTES = 2**28
"""memory traffic of the largest case that is compared; float64 tensors and the saved gradients take
several times as much"""
UNCHECKED: Parity = {"ok": False, "checked": 0, "worst": ""}


def reduced(spec: OpSpec, case: Case, dtype: torch.dtype) -> Case:
    """The case, made small enough to be compared in float64 (`MOST_BYTES`).

    Samples are halved first; a case of one sample has its largest size halved.
    """
    shape = dict(case.shape)
    while spec.work(replace(case, shape=shape), dtype).forward_bytes > MOST_BYTES:
        letter = "B" if shape.get("B", 1) > 1 else max(shape, key=lambda size: shape[size])
        shape[letter] //= 2
    return replace(case, shape=shape)


def small_cases(spec: OpSpec, backend: str, dtype: torch.dtype, few: bool = False) -> list[Case]:
    """The small cases that the backend takes; with `few` the first and the heaviest of them."""
    refuses = spec.backend(backend).refuses
    cases = [case for case in spec.small_cases if not refuses(case, dtype)]
    if not few or len(cases) < 3:
        return cases
    heaviest = max(cases[1:], key=lambda case: spec.work(case, dtype).forward_bytes)
    return [cases[0], heaviest]


class ParityChecker:
    """Compares candidates with the reference on one device.

    A candidate must be right on the op's small cases, compared once for each backend, and on its
    own case, reduced. The reference counts as right. The compiled reference skips the small cases:
    each would cost a compilation, of code that is not ours.
    """

    def __init__(self, device: str, few: bool = False, own: bool = True) -> None:
        """few: two small cases for each backend are enough (`small_cases`). own: whether the
        candidate's own case is compared, too."""
        self.device = device
        self.few = few
        self.own = own
        self._of_small_cases: dict[tuple[str, str], list[harness.Verdict]] = {}

    def check(self, candidate: Candidate, function: Function) -> Parity:
        """Verdict on `function`, the candidate's implementation."""
        if candidate.backend == _reference(candidate.spec):
            return {"ok": True, "checked": 0, "worst": "the others are held to it"}
        verdicts = [*self._small_cases(candidate)]
        if self.own:
            own = reduced(candidate.spec, candidate.case, candidate.dtype)
            verdicts += self._verdicts(candidate, [own], function)
        return {
            "ok": all(verdict.ok for verdict in verdicts),
            "checked": len(verdicts),
            "worst": str(max(verdicts, key=share_of_budget)),
        }

    def _small_cases(self, candidate: Candidate) -> list[harness.Verdict]:
        if candidate.backend == COMPILED:
            return []
        spec, key = candidate.spec, (candidate.spec.name, candidate.backend)
        if key not in self._of_small_cases:
            cases = small_cases(spec, candidate.backend, candidate.dtype, few=self.few)
            self._of_small_cases[key] = self._verdicts(candidate, cases, None)
        return self._of_small_cases[key]

    def _verdicts(
        self, candidate: Candidate, cases: Iterable[Case], function: Function | None
    ) -> list[harness.Verdict]:
        # The compiled reference is judged as the reference is.
        is_compiled = candidate.backend == COMPILED
        backend = _reference(candidate.spec) if is_compiled else candidate.backend
        return [
            verdict
            for case in cases
            for verdict in harness.check(
                candidate.spec,
                backend,
                case,
                candidate.dtype,
                device=self.device,
                function=function,
            )
        ]


def _reference(spec: OpSpec) -> str:
    """Name of the op's reference, which is its last backend."""
    return spec.backends[-1].name


def share_of_budget(verdict: harness.Verdict) -> float:
    """Error over its budget; infinite where the error is NaN."""
    share = verdict.error / max(verdict.budget, 1e-30)
    return math.inf if math.isnan(share) else share
