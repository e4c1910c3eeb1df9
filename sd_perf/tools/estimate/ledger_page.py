"""The ledger for the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sd_kernels.targets import GPUS
from sd_perf.tools.estimate.ledger_recorder import PHASES


def ledger_tables(facts: dict[str, Any]) -> Iterable[Any]:
    """Phases, operators beside the floor, and what lies beyond it by cause."""
    found = facts["ledger"]
    yield _phases(facts)
    yield _operators(found)
    yield _causes(found, facts["batch"])
    yield (
        "Traced without a GPU: launches and bytes are those of the code that runs, no time is "
        "measured. The floor reads every input and writes every result of each operator once."
    )


def _table(*headers: str, title: str) -> Any:
    from rich.table import Table  # the figures themselves need no terminal

    table = Table(headers[0], title=title, title_justify="left")
    for header in headers[1:]:
        table.add_column(header, justify="right")
    return table


def _phases(facts: dict[str, Any]) -> Any:
    found, batch = facts["ledger"], facts["batch"]
    title = f"One training step, {GPUS[facts['gpu']].title}, batch {batch}"
    table = _table("", "launches", "GB read", "GB written", "GB a sample", title=title)
    rows = {phase: found["phases"][phase] for phase in PHASES} | {"step": found}
    for name, row in rows.items():
        if name == "step":
            table.add_section()
        read, written = row["read"] / 1e9, row["written"] / 1e9
        cells = f"{read:.2f}", f"{written:.2f}", f"{(read + written) / batch:.3f}"
        table.add_row(name, str(row["launches"]), *cells)
    return table


def _operators(found: dict[str, Any]) -> Any:
    title = "kernels of the operators, GB a step"
    table = _table("", "launches", "ledger", "floor", "beyond", title=title)
    for op, row in found["ops"].items():
        sizes = (row[name] / 1e9 for name in ("bytes", "floor", "beyond"))
        table.add_row(op, str(row["launches"]), *(f"{size:.3f}" for size in sizes))
    return table


def _causes(found: dict[str, Any], batch: int) -> Any:
    title = "beyond the floor, by cause"
    table = _table("", "launches", "GB a step", "MB a sample", title=title)
    for row in found["causes"]:
        launches = str(row["launches"]) if row["launches"] else ""
        sizes = f"{row['bytes'] / 1e9:.3f}", f"{row['bytes'] / batch / 1e6:.2f}"
        table.add_row(row["cause"], launches, *sizes)
    return table
