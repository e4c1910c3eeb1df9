"""The Triton launches that `gpu_acceptance` will make, recorded on a machine without a GPU.

They are the calls of the kernels that are compared and timed one by one, and of the whole networks
that are compared, trained and timed, in the order in which they are needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from benchmarks.ahead_of_time import compile_for, launches_of
from benchmarks.gpu_device import Device, Scale
from benchmarks.kernel_cases import plan
from benchmarks.kernel_parity import reduced, small_cases
from sd_kernels.registry import all_ops
from sd_kernels.spec import Case, OpSpec
from sd_kernels.targets import GPUS
from sd_perf.config import Config
from sd_perf.fast.architecture import architecture

NETWORKS = (
    (Device.full, 64, torch.bfloat16),
    (Device.small, 2, torch.bfloat16),
    (Device.small, 4, torch.bfloat16),
    (Device.small, 2, torch.float32),
    (Device.small, 4, torch.float32),
    (Device.full, 2, torch.bfloat16),
    (Device.full, 2, torch.float32),
    (Device.full, 8, torch.bfloat16),
    (Device.full, 16, torch.bfloat16),
    (Device.full, 32, torch.bfloat16),
)
"""scale, batch and dtype of the networks that run: timed, checked small, checked at full size,
timed at other batches"""


class Specialisation(NamedTuple):
    """One kernel as the compiler takes it."""

    op: str
    key: str
    source: Any
    """triton.compiler.ASTSource"""
    options: dict[str, Any]


def specialisations(ops: list[str], capability: int) -> list[Specialisation]:
    """Every distinct kernel of these operators, in the order of `recorded_cases`.

    capability: 90 for compute capability 9.0. Operators without Triton kernels add nothing.
    """
    found: dict[str, Specialisation] = {}
    for spec, cases, dtype in recorded_cases(ops):
        if divmod(capability, 10) < spec.backend(str(spec.ours)).capability:
            continue
        for _, launch in launches_of(replace(spec, cases=tuple(cases)), dtype):
            key, source, options = compile_for(launch, capability)
            found.setdefault(key, Specialisation(spec.name, key, source, options))
    return list(found.values())


def recorded_cases(ops: list[str]) -> Iterator[tuple[OpSpec, list[Case], torch.dtype]]:
    """Calls of each operator with Triton kernels: alone first, then within each network."""
    specs = [spec for name, spec in all_ops().items() if spec.ours and name in ops]
    for candidate in plan(GPUS["h100"].target, ops, heaviest_only=True):
        if candidate.backend == candidate.spec.ours:
            spec, case, dtype = candidate.spec, candidate.case, candidate.dtype
            small = small_cases(spec, candidate.backend, dtype, few=True)
            yield spec, [case, reduced(spec, case, dtype), *small], dtype
    for scale, batch, dtype in NETWORKS:
        for spec in specs:
            if dtype in spec.dtypes:
                yield spec, _network_cases(spec, scale, batch), dtype


def _network_cases(spec: OpSpec, scale: Scale, batch: int) -> list[Case]:
    """The calls of one training step of a network at a batch size."""
    whole = Config(model=replace(scale.config, implementation="fast"))
    unet = architecture(replace(whole, data=replace(whole.data, latent_size=scale.latent_size)))
    cases = spec.cases_of(unet) if spec.cases_of else spec.cases
    return [case.at_batch(batch) if "B" in case.shape else case for case in cases]
