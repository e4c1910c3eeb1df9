"""Which backend runs each operator: the config's section `kernels` resolved for a GPU, in the words of its keys."""

from __future__ import annotations

from dataclasses import fields

import torch

from sd_kernels.errors import KernelError
from sd_kernels.registry import all_ops
from sd_kernels.selection import AUTO, Choice, choose
from sd_kernels.spec import DECLARED_TARGETS, Target
from sd_perf.config import Config, KernelsConfig
from sd_perf.errors import ConfigError
from sd_perf.models.architecture import architecture

REFERENCE = "reference"


def target_named(name: str) -> Target:
    """The declared GPU of that name, or with `here` this machine's device."""
    return Target.here() if name == "here" else DECLARED_TARGETS[name]


def choose_kernels(config: Config, target: Target) -> dict[str, Choice]:
    """The backend of every operator, for the calls that the config's model makes. Raises ConfigError naming the key."""
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    unet, choices = architecture(config), {}
    for name, spec in all_ops().items():
        wanted, cases = getattr(config.kernels, name), spec.cases_of(unet) if spec.cases_of else ()
        try:
            choices[name] = choose(name, wanted, target, cases, dtype, config.kernels.strict)
        except KernelError as error:
            raise ConfigError(str(error)) from error
    return choices


def require_used(config: Config) -> None:
    """ConfigError where the config chooses kernels and the plain model, which runs none."""
    if config.model.implementation == "fast":
        return
    for key in (field.name for field in fields(KernelsConfig)):
        right = "false" if key == "strict" else f"{AUTO} or {REFERENCE}"
        right += ", since model.implementation is 'plain', which runs no kernels"
        config.kernels.require(getattr(config.kernels, key) in (AUTO, REFERENCE, False), key, right)
