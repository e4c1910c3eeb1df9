"""Every op, backend and case: forward and gradients against float64, and what a registered op owes
torch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, product
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from sd_kernels import harness
from sd_kernels.registry import all_ops
from sd_kernels.selection import reasons_against
from sd_kernels.spec import Backend, Case, Inputs, OpSpec, Target

OPS = list(all_ops().values())
SAMPLED = 3
"""small cases per op that `make test` runs, by turns in the first and the second dtype of ours;
`make test-all` runs all in all"""


def combinations(spec: OpSpec) -> Iterator[Any]:
    named = [spec.ours] if spec.ours else []
    ours = product(named, enumerate(spec.small_cases), spec.dtypes)
    # In float64 where they can: any error of theirs is then one of how the adapter calls them.
    adapters = (
        (other.name, (number, case), on_gpu(other) or widest(other, case))
        for other, (number, case) in product(spec.backends[:-1], enumerate(spec.small_cases))
        if not other.ours
    )
    for backend, (number, case), dtype in chain(ours, adapters):
        turn = spec.dtypes[number % 2 % len(spec.dtypes)] if backend == "triton" else dtype
        often = number < SAMPLED and dtype == turn
        label = f"{spec.name}-{backend}-{case.name}-{dtype}".replace(" ", "_")
        yield pytest.param(
            spec, backend, case, dtype, id=label, marks=[] if often else pytest.mark.slow
        )


def on_gpu(backend: Backend) -> torch.dtype | None:
    return backend.gpu_dtypes[0] if backend.gpu_dtypes and torch.cuda.is_available() else None


def widest(backend: Backend, case: Case) -> torch.dtype:
    return torch.float32 if backend.refuses(case, torch.float64) else torch.float64


COMBINATIONS = [combination for spec in OPS for combination in combinations(spec)]


def skip_if_absent(spec: OpSpec, backend: str, case: Case, dtype: torch.dtype) -> None:
    against = reasons_against(spec.backend(backend), Target.here(), [case], dtype)
    if against:
        pytest.skip("; ".join(map(str, against)))


@pytest.mark.parametrize(("spec", "backend", "case", "dtype"), COMBINATIONS)
def test_equals_the_reference(
    spec: OpSpec, backend: str, case: Case, dtype: torch.dtype, device: str
) -> None:
    skip_if_absent(spec, backend, case, dtype)
    verdicts = harness.check(spec, backend, case, dtype, device)
    assert verdicts
    assert all(verdict.ok for verdict in verdicts), "\n".join(map(str, verdicts))


@pytest.mark.parametrize(
    "spec", [spec for spec in OPS if spec.differentiable], ids=lambda spec: spec.name
)
def test_reference_has_the_gradient_of_its_forward(spec: OpSpec) -> None:
    inputs = spec.inputs(spec.small_cases[0], Inputs(spec.small_cases[0], torch.float64))
    names = [
        name
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and value.requires_grad
    ]

    def of_tensors(*tensors: torch.Tensor) -> Any:
        results = spec.reference()(**{**inputs, **dict(zip(names, tensors, strict=True))})
        return (
            results
            if isinstance(results, torch.Tensor)
            else tuple(out for out in results if out.requires_grad)
        )

    assert torch.autograd.gradcheck(of_tensors, [inputs[name] for name in names])


class OurOps(TorchDispatchMode):
    """Keeps the calls of this package's registered ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "sd_kernels":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def with_kernels() -> list[OpSpec]:
    return [spec for spec in OPS if spec.ours]


@pytest.mark.parametrize("spec", with_kernels(), ids=lambda spec: spec.name)
def test_opcheck(spec: OpSpec, device: str) -> None:
    case = spec.small_cases[0]
    with OurOps() as ours:
        harness.evaluate(
            spec,
            spec.backend(spec.ours or "").function(spec.name),
            spec.inputs(case, Inputs(case, spec.dtypes[0], device)),
        )
    assert ours.calls
    for op, args, kwargs in ours.calls:
        # A gradient has no gradient: what it saved needs none.
        is_forward = op._opname.endswith("_forward")
        torch.library.opcheck(
            op,
            args if is_forward else pytree.tree_map_only(torch.Tensor, torch.detach, args),
            kwargs,
        )


AUTOMATIC = [(spec, backend) for spec in OPS for backend in spec.backends[:-1] if backend.automatic]


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("spec", "backend"),
    [pytest.param(*pair, id=f"{pair[0].name}-{pair[1].name}") for pair in AUTOMATIC],
)
def test_traces_without_a_graph_break(
    spec: OpSpec, backend: Backend, number: int, device: str
) -> None:
    case, dtype = spec.small_cases[number], on_gpu(backend) or spec.dtypes[0]
    skip_if_absent(spec, backend.name, case, dtype)
    function = backend.function(spec.name)
    # Shapes that another test compiled would make sizes symbols; the UNet is compiled without.
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
    inputs = spec.inputs(case, Inputs(case, dtype, device))
    eager, traced = (
        harness.evaluate(spec, function, inputs),
        harness.evaluate(spec, compiled, inputs),
    )
    assert eager.keys() == traced.keys()
    for name, value in eager.items():
        # Torch's own operators may be taken apart, which rounds otherwise.
        exactly = {"rtol": 0, "atol": 0} if backend.ours else {}
        torch.testing.assert_close(traced[name], value, **exactly, msg=name)
