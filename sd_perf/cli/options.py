"""Types and checks of the options that several commands take. Imports neither torch nor kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro

from sd_kernels.targets import names
from sd_perf.config import SEED, Config
from sd_perf.errors import UserError

RunFolder = tyro.conf.Positional[Path]
"""a run folder, given without an option's name"""
Settings = Annotated[Config, tyro.conf.arg(name="")]
"""the preset that --config names, each field an option that overrides it"""
GPUName = Annotated[str, tyro.conf.arg(metavar="{" + ",".join(names()) + "}")]
"""a GPU of the table in sd_kernels.targets; the command itself refuses other names"""
TargetName = Annotated[str, tyro.conf.arg(metavar="{" + ",".join(("here", *names())) + "}")]
"""the same, or `here`: this machine's device"""


MAX_SAMPLES, MAX_BATCH = 10_000_000, 1_000_000
"""upper limits of --samples, --ranks and --batch, beyond what anyone computes"""


def require_between(option: str, value: int, least: int, most: int) -> None:
    """`require_option` of a whole number between two limits, both included."""
    low = f"at least {least:,}" if least else "0 or more"
    right = low if value < least else f"at most {most:,}"
    require_option(option, value, least <= value <= most, right)


def require_seed(option: str, seed: int) -> None:
    """`require_option` of a seed, by the rule of training.seed."""
    require_option(option, seed, SEED.holds(seed), SEED.right)


def require_option(option: str, value: Any, ok: bool, right: str) -> None:
    """Raise UserError unless `ok`: the option, its value, and what is right instead."""
    if not ok:
        raise UserError(f"{option}: {value!r} cannot be used; it must be {right}")
