"""Section `kernels`: which backend runs each operator of the fast network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sd_kernels import op_help, op_names
from sd_perf.config.rules import Section


def _with_ops(section: type) -> type:
    """The section with a field per op folder of sd_kernels, so that a new op is no edit here."""
    names = op_names()
    section.__annotations__ = {**dict.fromkeys(names, "str"), **section.__annotations__}
    for name in names:
        setattr(section, name, "auto")
    # The command line reads help from here where no text stands under a field.
    helps = "".join(f"    {name}: {op_help(name)}\n" for name in names)
    section.__doc__ = f"{section.__doc__}\n\nAttributes:\n{helps}"
    return section


@dataclass(frozen=True)
@_with_ops
class KernelsConfig(Section):
    """Which implementation runs each operator: auto, or a backend that `sd-perf doctor` lists."""

    section = "kernels"

    strict: bool = False
    """make auto fail where it would pass over a faster backend"""

    if TYPE_CHECKING:  # the fields of the ops

        def __init__(self, strict: bool = False, **backends: str) -> None: ...
        def __getattr__(self, op: str) -> str: ...
