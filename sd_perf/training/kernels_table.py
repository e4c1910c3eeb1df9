"""The chosen backends as a table for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from sd_perf.console import styled


def kernels_table(target: str, kernels: Mapping[str, Mapping[str, Any]]) -> tuple[Any, ...]:
    """A title and a table: op, backend, and why each better backend was passed over.

    `kernels` has a `Choice` as a dict for each operator; it is empty for the plain network, which
    needs no table.
    """
    if not kernels:
        return ()
    table = Table("op", "backend", "why no better one")
    for choice in kernels.values():
        reasons = [f"{name}: {why}" for name, why in choice["passed_over"].items()]
        named = [] if choice["wanted"] == "auto" else ["named in the config"]
        table.add_row(choice["op"], choice["backend"], "; ".join([*named, *reasons]))
    return styled("italic", f"kernels on {target}"), table
