"""What the kernel benchmark measures: every backend of every op on the op's full-size calls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from sd_kernels.registry import all_ops
from sd_kernels.sd_v2_shapes import BATCH
from sd_kernels.selection import reasons_against
from sd_kernels.spec import Case, Function, Matmuls, OpSpec
from sd_kernels.targets import Target

COMPILED = "torch.compile"
"""backend name of the op's reference under torch.compile"""
Direction = Literal["forward", "backward", "dgrad", "wgrad"]
"""dgrad and wgrad are the two matmuls of a backward pass: the gradient of the input, and the
gradients of weight and bias"""


@dataclass(frozen=True)
class Candidate:
    """One backend on one case of an op, in one dtype. Each direction is a row of the result."""

    spec: OpSpec
    case: Case
    backend: str
    """name of a backend of the op, or `COMPILED`"""
    dtype: torch.dtype
    unavailable: str = ""
    """why the backend cannot run here; empty: it can"""

    def function(self) -> Function:
        """The implementation; ImportError where its package is absent."""
        if self.backend == COMPILED:
            return torch.compile(self.spec.reference(), dynamic=False)
        return self.spec.backend(self.backend).function(self.spec.name)

    def moved_bytes(self, direction: Direction) -> float:
        """Least memory traffic of a call, bytes.

        dgrad and wgrad count as the forward: each of the three matmuls reads two of input, weight
        and output, and writes the third.
        """
        work = self.spec.work(self.case, self.dtype)
        return work.backward_bytes if direction == "backward" else work.forward_bytes

    def flops(self, direction: Direction) -> float:
        """Floating-point operations of a call's matmuls. dgrad and wgrad have the forward's."""
        work = self.spec.work(self.case, self.dtype)
        return work.backward_flops or 2 * work.flops if direction == "backward" else work.flops

    def directions(self) -> list[Direction]:
        """The directions that are timed apart; an op without a backward has the forward alone."""
        computed = self.spec.matmuls(self.case) if self.spec.matmuls else None
        if isinstance(computed, Matmuls):
            return ["forward", "dgrad", "wgrad"]
        return ["forward", "backward"] if self.moved_bytes("backward") else ["forward"]


def plan(
    target: Target,
    ops: Iterable[str] = (),
    case_filter: str = "",
    dtype: torch.dtype = torch.bfloat16,
    batch: int = BATCH,
    heaviest_only: bool = False,
    compiled: bool = True,
) -> list[Candidate]:
    """All candidates, in the order in which they are measured; unavailable ones included.

    ops: names, all where empty. case_filter: only cases whose name contains it. batch: samples.
    heaviest_only: of each op the case with the most memory traffic in a training step. compiled:
    whether the reference under torch.compile is a candidate, which is compiled for every case.
    """
    candidates: list[Candidate] = []
    for spec in (all_ops()[name] for name in ops or all_ops()):
        cases = [case for case in spec.cases if case_filter in case.name]
        if dtype not in spec.dtypes or not cases:
            continue
        if heaviest_only:
            cases = [max(cases, key=lambda case: case.calls * spec.work(case, dtype).forward_bytes)]
        for case in cases:
            sized = case.at_batch(batch) if "B" in case.shape else case
            candidates += _candidates(spec, sized, dtype, target)
    return [each for each in candidates if compiled or each.backend != COMPILED]


def _candidates(
    spec: OpSpec, case: Case, dtype: torch.dtype, target: Target
) -> Iterator[Candidate]:
    for backend in spec.backends:
        reasons = reasons_against(backend, target, [case], dtype)
        yield Candidate(spec, case, backend.name, dtype, unavailable="; ".join(map(str, reasons)))
    yield Candidate(spec, case, COMPILED, dtype)
