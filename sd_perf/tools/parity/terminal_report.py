"""A parity record in the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table
from rich.text import Text

from sd_perf.console import styled
from sd_perf.runs.parity_record import closest_to_limit, counts_in_words, rows_by_level, verdict
from sd_perf.visible import visible


def terminal_report(record: dict[str, Any]) -> Iterator[Table | Text | str]:
    """What rich prints: a line per level, every comparison that is red, what ran, the verdict."""
    summary = Table("level", "comparisons", "red", "closest to its limit")
    for level, rows in rows_by_level(record):
        red = sum(not row["ok"] for row in rows)
        summary.add_row(level, str(len(rows)), str(red), closest_to_limit(rows))
    yield summary
    wrong = [row for row in record["rows"] if not row["ok"]]
    yield from map(_red_line, wrong)
    yield "Triton kernels: " + (counts_in_words(record["triton_launches"]) or "none ran")
    yield from record["notes"]
    yield styled("bold red" if wrong else "bold green", verdict(record))


def _red_line(row: dict[str, Any]) -> Text:
    name = row["name"] + (f" – {row['note']}" if row["note"] else "")
    largest = _measure(row["max_error"], row["max_budget"], row["torch_max"])
    rms = _measure(row["rms_error"], row["rms_budget"], row["torch_rms"])
    where = f"{row['where']}, {row['dtype']}"
    told = visible(f" {name}, {where}: max {largest}, RMS {rms}")
    return Text.assemble(styled("red", row["level"]), told)


def _measure(error: float | str, budget: float | str, by_torch: float | str) -> str:
    """Numbers of a record; NaN and infinity are words there."""
    error, budget, by_torch = (f"{float(number):.2e}" for number in (error, budget, by_torch))
    return f"{error} (allowed {budget}, plain torch {by_torch})"
