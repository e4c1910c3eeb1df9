"""Types and checks of the options that several commands take. Imports neither torch nor kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import tyro

from sd_kernels.targets import names
from sd_perf.config import Config
from sd_perf.errors import UserError

RunFolder = tyro.conf.Positional[Path]
"""a run folder, given without an option's name"""
Settings = Annotated[Config, tyro.conf.arg(name="")]
"""the preset that --config names, each field an option that overrides it"""
GPUName = Annotated[str, tyro.conf.arg(metavar="{" + ",".join(names()) + "}")]
"""a GPU of the table in sd_kernels.targets; the command itself refuses other names"""
TargetName = Annotated[str, tyro.conf.arg(metavar="{" + ",".join(("here", *names())) + "}")]
"""the same, or `here`: this machine's device"""


def require_option(option: str, value: Any, ok: bool, right: str) -> None:
    """Raise UserError unless `ok`: the option, its value, and what is right instead."""
    if not ok:
        raise UserError(f"{option}: {value!r} cannot be used; it must be {right}")
