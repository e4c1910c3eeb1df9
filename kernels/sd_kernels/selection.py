"""Which backend runs an op: the one that is named, or the first that can be had."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

import torch

from sd_kernels.errors import KernelError
from sd_kernels.reasons import NOT_DETERMINISTIC, ONLY_NAMED, Reason, of_case
from sd_kernels.registry import all_ops
from sd_kernels.spec import Backend, Case, Function, OpSpec
from sd_kernels.targets import Target

AUTO = "auto"


@dataclass(frozen=True)
class Choice:
    """The backend that runs an op, and why each backend before it does not."""

    op: str
    backend: str
    wanted: str
    passed_over: dict[str, str] = field(default_factory=dict)

    def function(self) -> Function:
        """The implementation."""
        return all_ops()[self.op].backend(self.backend).function(self.op)


def reasons_against(
    backend: Backend,
    target: Target,
    cases: Iterable[Case] = (),
    dtype: torch.dtype = torch.bfloat16,
    deterministic: bool = False,
) -> list[Reason]:
    """Everything that keeps a backend from running these cases on the target; empty: it can.

    A reason that several cases share is given once, for the first of them. With `deterministic`
    the backend must give the same bits in each run.
    """
    missing = backend.missing(target) or _wrong_dtype(backend, target, dtype)
    refusals: dict[Reason, str] = {}
    for case in cases:
        if why := backend.refuses(case, dtype):
            refusals.setdefault(why, case.name)
    reasons = [missing] if missing else []
    if deterministic and target.device == "cuda" and not backend.deterministic:
        reasons.append(NOT_DETERMINISTIC)
    return [*reasons, *(of_case(name, why) for why, name in refusals.items())]


def _wrong_dtype(backend: Backend, target: Target, dtype: torch.dtype) -> Reason | None:
    if target.device != "cuda" or not backend.gpu_dtypes or dtype in backend.gpu_dtypes:
        return None
    takes = f"takes {' or '.join(map(str, backend.gpu_dtypes))} on a GPU"
    return Reason("dtype", f"{takes}, not {dtype}", takes)


def choose(
    op: str,
    wanted: str = AUTO,
    target: Target | None = None,
    cases: Iterable[Case] = (),
    dtype: torch.dtype = torch.bfloat16,
    strict: bool = False,
    deterministic: bool = False,
) -> Choice:
    """The backend for an op; with `deterministic` one that gives the same bits in each run.

    A backend that is asked for by name and cannot run here is a KernelError with every reason.
    `auto` takes the first backend that can run. With `strict` it is an error that `auto` passes one
    over, unless that one is for other GPUs than this, runs only when it is named, or is not
    deterministic in a run that must be.
    """
    spec = _spec(op)
    target = target or Target.here()
    cases = list(cases)
    if wanted != AUTO:
        return _named(spec, wanted, target, cases, dtype, deterministic)
    # The interpreter is for tests, which name their backend.
    target = replace(target, interpreted=False)
    passed_over: dict[str, str] = {}
    for backend in spec.backends:
        against = reasons_against(backend, target, cases, dtype, deterministic)
        if not backend.automatic:
            against = [ONLY_NAMED, *against]
        if not against:
            break
        passed_over[backend.name] = str(against[0])
    chosen = Choice(op, backend.name, wanted, passed_over)
    slower = [
        f"{name}: {why}"
        for name, why in passed_over.items()
        if _may_be_had(spec.backend(name), target, deterministic)
    ]
    if strict and slower:
        raise KernelError(
            f"kernels.{op}: auto would take {chosen.backend!r} on {target.name}, which "
            "kernels.strict forbids "
            f"({' | '.join(slower)}); install what is missing, or name the backend"
        )
    return chosen


def _may_be_had(backend: Backend, target: Target, deterministic: bool) -> bool:
    is_for_another_gpu = target.device == "cuda" and backend.unfit(target) is not None
    is_excluded = deterministic and not backend.deterministic
    return backend.automatic and not is_for_another_gpu and not is_excluded


def _spec(op: str) -> OpSpec:
    if op not in all_ops():
        raise KernelError(
            f"{op!r} is not an op{_suggestion(op, list(all_ops()))}; ops are {', '.join(all_ops())}"
        )
    return all_ops()[op]


def _named(
    spec: OpSpec,
    wanted: str,
    target: Target,
    cases: list[Case],
    dtype: torch.dtype,
    deterministic: bool,
) -> Choice:
    names = [backend.name for backend in spec.backends]
    if wanted not in names:
        hint = _suggestion(wanted, names)
        raise KernelError(
            f"kernels.{spec.name}: {wanted!r} is not a backend{hint}; choose auto, "
            f"{', '.join(names)}"
        )
    against = reasons_against(spec.backend(wanted), target, cases, dtype, deterministic)
    if against:
        why = "; ".join(map(str, against))
        raise KernelError(
            f"kernels.{spec.name}: {wanted!r} cannot be had on {target.name}: {why}; or choose auto"
        )
    return Choice(spec.name, wanted, wanted)


def _suggestion(word: str, names: list[str]) -> str:
    close = get_close_matches(word, names, 1)
    return f" (did you mean {close[0]!r}?)" if close else ""
