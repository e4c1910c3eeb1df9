"""Is a backend right? Its outputs and gradients are compared with the reference in float64.

The error may be at most twice that of plain torch at the same dtype, which is also the rule of
flash-attention's tests. It is measured twice, as root mean square and as largest deviation, each
relative to the float64 result. Four ulp of float32 are always allowed, since plain torch is
sometimes exact by chance.

Plain torch is the reference at that dtype. Kernels of other libraries may round elsewhere: for them
it is the worse of the reference and torch's own operator (`Backend.yardstick`). Outputs that a spec
calls exact must equal the reference at the same dtype bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sd_kernels.launch import poisoned_outputs
from sd_kernels.spec import Case, Function, Inputs, OpSpec

Tensors = dict[str, torch.Tensor]

FLOOR = 8 * 2.0**-24
"""relative error that is always allowed: four ulp of float32"""


@dataclass(frozen=True)
class Verdict:
    """One output or gradient of one case: its error, plain torch's, and what was allowed."""

    op: str
    backend: str
    case: str
    dtype: str
    output: str
    measure: str
    """rms or max: relative to the same norm of the float64 result; bits: share of elements that
    differ"""
    error: float
    torch_error: float
    budget: float

    @property
    def ok(self) -> bool:
        """False also where the error is NaN."""
        return self.error <= self.budget

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "WRONG"
        what = f"{self.op}/{self.backend} {self.case} {self.dtype} {self.output}"
        return (
            f"{what}: {self.measure} error {self.error:.2e}, allowed {self.budget:.2e}: {verdict}"
        )


def evaluate(spec: OpSpec, function: Function, inputs: Mapping[str, Any], seed: int = 1) -> Tensors:
    """Outputs by name and, as `grad NAME`, the gradients of the inputs.

    Gradients are those of a weighted sum of the outputs; the weights are normal numbers of `seed`.
    """
    names = [
        name
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and value.requires_grad
    ]
    results = function(**(copied(inputs) if spec.in_place else inputs))
    outputs = (results,) if isinstance(results, torch.Tensor) else tuple(results)
    named = dict(zip(spec.outputs, outputs, strict=False))
    differentiable = [output for output in outputs if output.requires_grad]
    if spec.differentiable and names and differentiable:
        weights = [_weights(output, seed + i) for i, output in enumerate(differentiable)]
        grads = torch.autograd.grad(
            differentiable, [inputs[name] for name in names], weights, allow_unused=True
        )
        named |= {
            f"grad {name}": grad
            for name, grad in zip(names, grads, strict=True)
            if grad is not None
        }
    return {name: value.detach() for name, value in named.items()}


def copied(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs in memory of their own, for an op that writes into them."""
    return {
        name: value.clone() if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }


def _weights(output: torch.Tensor, seed: int) -> torch.Tensor:
    # Rounded to eighths, so that they are the same numbers in every dtype.
    generator = torch.Generator(output.device).manual_seed(seed)
    weights = torch.randn(output.shape, generator=generator, device=output.device)
    return (weights * 8).round().div(8).to(output.dtype)


def in_float64(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs in float64: floating-point tensors, and options that name a dtype."""
    return {name: _widened(value) for name, value in inputs.items()}


def _widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return torch.float64 if isinstance(value, torch.dtype) else value


def check(
    spec: OpSpec,
    backend: str,
    case: Case,
    dtype: torch.dtype,
    device: str = "cpu",
    seed: int = 0,
    function: Function | None = None,
) -> list[Verdict]:
    """Verdicts of one case.

    `function` replaces the backend's own: one with a planted fault, or a compiled one.
    """
    inputs = spec.inputs(case, Inputs(case, dtype, device, seed))
    exact = spec.exact if spec.backend(backend).exact else ()
    yardsticks = [
        evaluate(spec, yardstick, inputs) for yardstick in _yardsticks(spec, backend, case, dtype)
    ]
    plain = yardsticks[0]
    # What only exact outputs are made of may have no meaning in float64: bits of integers.
    truth = (
        {} if plain.keys() <= set(exact) else evaluate(spec, spec.reference(), in_float64(inputs))
    )
    with poisoned_outputs():
        ours = evaluate(spec, function or spec.backend(backend).function(spec.name), inputs)
    verdict = partial(Verdict, spec.name, backend, case.name, str(dtype).removeprefix("torch."))
    verdicts = []
    for name in ours.keys() | plain.keys():
        if name not in ours or name not in plain:
            nan = float("nan")
            verdicts.append(verdict(name, "missing", error=nan, torch_error=nan, budget=0.0))
        elif name in exact:
            different = (ours[name] != plain[name]).double().mean().item()
            verdicts.append(verdict(name, "bits", error=different, torch_error=0.0, budget=0.0))
        else:
            torch_results = [results[name] for results in yardsticks]
            for measure, errors in _compare(ours[name], torch_results, truth[name]).items():
                verdicts.append(verdict(name, measure, **errors))
    return sorted(verdicts, key=lambda verdict: (verdict.output, verdict.measure))


def _yardsticks(spec: OpSpec, backend: str, case: Case, dtype: torch.dtype) -> list[Function]:
    """The plain torch functions that the backend's error is compared with; the reference first."""
    chosen = spec.backend(backend)
    # In float32 torch's operator is itself compared with the reference alone. In low precision it
    # rounds as it likes, and is compared with itself, too.
    to_reference_alone = chosen.ours or (chosen.yardstick and dtype.itemsize >= 4)
    native = [] if to_reference_alone else [other for other in spec.backends if other.yardstick]
    taken = [other.function(spec.name) for other in native if not other.refuses(case, dtype)]
    return [spec.reference(), *taken]


def _compare(
    ours: torch.Tensor, torch_results: list[torch.Tensor], truth: torch.Tensor
) -> dict[str, dict[str, float]]:
    """`Verdict.error`, `torch_error` and `budget` by measure: rms and max."""
    measured = {}
    for measure, norm in (("rms", 2.0), ("max", float("inf"))):
        scale = torch.linalg.vector_norm(truth.double(), norm).clamp_min(1e-30)
        error, *torch_errors = (
            (torch.linalg.vector_norm(result.double() - truth, norm) / scale).item()
            for result in (ours, *torch_results)
        )
        worst = max(torch_errors)
        measured[measure] = {"error": error, "torch_error": worst, "budget": 2 * worst + FLOOR}
    return measured
