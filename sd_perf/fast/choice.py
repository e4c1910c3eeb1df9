"""Which backend runs each operator: the config's section `kernels` resolved for a device.

Errors name the config's keys. `training.launch` asks once per run.
"""

from __future__ import annotations

from dataclasses import fields

import torch

from sd_kernels.errors import KernelError
from sd_kernels.registry import all_ops
from sd_kernels.selection import AUTO, Choice, choose, reasons_against
from sd_kernels.targets import Target, named
from sd_perf.config import Config, KernelsConfig
from sd_perf.errors import ConfigError
from sd_perf.fast.architecture import architecture

REFERENCE = "reference"


def target_named(name: str) -> Target:
    """The GPU of `sd_kernels.targets` of that name, or with `here` this machine's device."""
    if name == "here":
        return Target.here()
    try:
        return named(name).target
    except LookupError as error:
        raise ConfigError(f"--target: {error}, or here") from error


def choose_kernels(config: Config, target: Target) -> dict[str, Choice]:
    """The backend of every operator, for the calls that the config's model makes.

    `kernels.strict` applies to the operators that training runs. ConfigError names the key.
    """
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    # A backend may refuse a call by its sizes, so it is asked about every call of this model.
    unet, used = architecture(config), used_ops(config)
    choices = {}
    for name, spec in all_ops().items():
        wanted = getattr(config.kernels, name)
        cases = spec.cases_of(unet) if spec.cases_of else ()
        if name == "adamw":
            # Its other cases are of dtypes that benchmarks measure.
            cases = tuple(case for case in cases if case.calls)
        try:
            choices[name] = choose(
                name,
                wanted=wanted,
                target=target,
                cases=cases,
                dtype=dtype,
                strict=config.kernels.strict and name in used,
                deterministic=config.training.deterministic,
            )
        except KernelError as error:
            raise ConfigError(str(error)) from error
    _require_fp8(config, target, choices["fp8_linear"])
    return choices


def _require_fp8(config: Config, target: Target, native: Choice) -> None:
    """ConfigError where a layer is configured in FP8 and the target cannot compute in FP8."""
    for _, arithmetic, key in config.precision.in_fp8():
        if arithmetic == "fp8_te":
            against = reasons_against(all_ops()["fp8_linear"].backend("te"), target)
            right = (
                f"fp8_native or bf16, since fp8_te cannot be had on {target.name}: "
                f"{'; '.join(map(str, against))}"
            )
            config.precision.require(not against, key, right)
        elif target.device == "cuda" and native.wanted == AUTO:
            # Who asks for FP8 on a GPU asks for speed, and the reference only emulates it. On a
            # CPU the reference is how such a run is tried out.
            reasons = "; ".join(f"{name}: {why}" for name, why in native.passed_over.items())
            right = (
                f"bf16 on {target.name} ({reasons}), or set kernels.fp8_linear to {REFERENCE}, "
                "which is slow"
            )
            config.precision.require(native.backend != REFERENCE, key, right)


def used_ops(config: Config) -> tuple[str, ...]:
    """The operators that the config's training runs; none with the plain network."""
    idle = set() if config.precision.uses("fp8_native") else {"fp8_linear"}
    is_fast = config.model.implementation == "fast"
    return tuple(op for op in all_ops() if is_fast and op not in idle)


def require_used(config: Config) -> None:
    """ConfigError where the config names a backend for an operator that training never calls."""
    # A key that is read and not obeyed would be a silent fallback.
    used, is_fast = used_ops(config), config.model.implementation == "fast"
    for key in (field.name for field in fields(KernelsConfig)):
        if key in used or (key == "strict" and is_fast):
            continue
        right = "false" if key == "strict" else f"{AUTO} or {REFERENCE}"
        right += f", since {_NO_FP8 if is_fast else _PLAIN}"
        config.kernels.require(getattr(config.kernels, key) in (AUTO, REFERENCE, False), key, right)


_PLAIN = "model.implementation is 'plain', which runs no kernels"
_NO_FP8 = "no layer of the section precision is fp8_native"
