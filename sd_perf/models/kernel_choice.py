"""Which backend runs each operator: the config's section `kernels` resolved for a GPU, in the words of its keys."""

from __future__ import annotations

from dataclasses import fields

import torch

from sd_kernels.errors import KernelError
from sd_kernels.registry import all_ops
from sd_kernels.selection import AUTO, Choice, choose, reasons_against
from sd_kernels.spec import DECLARED_TARGETS, Target
from sd_perf.config import Config, KernelsConfig, UNetConfig
from sd_perf.errors import ConfigError

REFERENCE = "reference"


def target_named(name: str) -> Target:
    """The declared GPU of that name, or with `here` this machine's device."""
    return Target.here() if name == "here" else DECLARED_TARGETS[name]


def choose_kernels(config: Config, target: Target) -> dict[str, Choice]:
    """The backend of every operator, for the calls that the config's model makes.

    Only the benchmark's own model has its calls listed in the specs; for another one a backend is judged by what it
    needs, and an operator itself refuses what it cannot compute. Raises ConfigError naming the key.
    """
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    is_benchmark = config.model.network == UNetConfig()
    choices = {}
    for name, spec in all_ops().items():
        wanted, cases = getattr(config.kernels, name), spec.cases if is_benchmark else ()
        try:
            choices[name] = choose(name, wanted, target, cases, dtype, config.kernels.strict)
        except KernelError as error:
            raise ConfigError(str(error)) from error
    _require_fp8(config, target, choices["fp8_linear"])
    return choices


def _require_fp8(config: Config, target: Target, native: Choice) -> None:
    """ConfigError where a layer is to be in FP8 and the target has none: that is no speed that is passed over."""
    for _, arithmetic, key in config.precision.in_fp8():
        if arithmetic == "fp8_te":
            against = reasons_against(all_ops()["fp8_linear"].backend("te"), target)
            right = f"fp8_native or bf16, since fp8_te cannot be had on {target.name}: {'; '.join(against)}"
            config.precision.require(not against, key, right)
        elif target.device == "cuda" and native.wanted == AUTO:
            reasons = "; ".join(f"{name}: {why}" for name, why in native.passed_over.items())
            right = f"bf16 on {target.name} ({reasons}), or set kernels.fp8_linear to {REFERENCE}, which is slow"
            config.precision.require(native.backend != REFERENCE, key, right)


def require_used(config: Config) -> None:
    """ConfigError where the config chooses kernels that the rest of it leaves without work."""
    kernels, key = config.kernels, "fp8_linear"
    if config.model.implementation == "fast":
        right = f"{AUTO} or {REFERENCE}, since no layer of the section precision is fp8_native"
        kernels.require(config.precision.uses("fp8_native") or getattr(kernels, key) in (AUTO, REFERENCE), key, right)
        return
    for key in (field.name for field in fields(KernelsConfig)):
        right = "false" if key == "strict" else f"{AUTO} or {REFERENCE}"
        right += ", since model.implementation is 'plain', which runs no kernels"
        kernels.require(getattr(kernels, key) in (AUTO, REFERENCE, False), key, right)
