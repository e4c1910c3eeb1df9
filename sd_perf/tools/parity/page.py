"""A parity record for people: the terminal's table, and parity.html."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from itertools import groupby
from typing import Any

from rich.table import Table

from sd_perf.config import Config
from sd_perf.runs.parity_record import LEVELS
from sd_perf.tools.html import document, quiet, table

_HEAD = (
    "what",
    "where",
    "dtype",
    "max error",
    "allowed",
    "torch's",
    "RMS error",
    "allowed",
    "torch's",
    "verdict",
)
_LEVELS = {
    "op": "Operators, each against its reference in float64",
    "block": "Blocks, each given what the plain one is given",
    "unet": "The whole UNet, forward",
    "grad": "Gradients, by kinds of parameters",
    "step": "The training step: draws, loss, optimizer, masters, sampler",
    "trajectory": "Loss over a few hundred steps",
    "world": "Whole runs over three seeds",
}
_RULE = (
    "Errors are relative, of the fast path against the plain one in float64. Allowed is twice "
    "what plain torch makes "
    "at the same dtype, and four ulp of float32. Interpreter: tiny shapes, every Triton kernel in "
    "Triton's "
    "interpreter, which cannot show how a GPU rounds. Structure: the config's network on the "
    "operators that a CPU has. "
    "Gpu: full size."
)


def verdict(record: dict[str, Any]) -> str:
    """The verdict in one line."""
    wrong = [row for row in record["rows"] if not row["ok"]]
    if not wrong:
        return f"green: {len(record['rows'])} comparisons at {len(record['levels'])} levels"
    named = "; ".join(f"{row['level']}: {row['name']}" for row in wrong[:3])
    return (
        f"red: {len(wrong)} of {len(record['rows'])} comparisons "
        f"({named}{', ...' if len(wrong) > 3 else ''})"
    )


def levels_of(record: dict[str, Any]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Rows by level, in the order of the levels."""
    rows = sorted(record["rows"], key=lambda row: LEVELS.index(row["level"]))
    for level, some in groupby(rows, key=lambda row: row["level"]):
        yield level, list(some)


def worst(rows: list[dict[str, Any]]) -> str:
    """The row that uses most of what it is allowed, in words."""
    shares = [(_share(row), row["name"]) for row in rows]
    share, name = max(shares)
    return f"{name}: {100 * share:.0f} % of what is allowed" if share else "all equal"


def _share(row: dict[str, Any]) -> float:
    pairs = ((row["max_error"], row["max_budget"]), (row["rms_error"], row["rms_budget"]))
    return max(
        (float(error) / float(budget) if budget else float(error != 0)) for error, budget in pairs
    )


def screen(record: dict[str, Any]) -> Iterable[Any]:
    """For the terminal: a line per level, then every comparison that is red, then what ran."""
    summary = Table("level", "comparisons", "red", "closest to its limit")
    for level, rows in levels_of(record):
        summary.add_row(level, str(len(rows)), str(sum(not row["ok"] for row in rows)), worst(rows))
    yield summary
    wrong = [row for row in record["rows"] if not row["ok"]]
    for row in wrong:
        name, where, dtype, *numbers, _ = _cells(row)
        errors = "{} (allowed {}, plain torch {}), RMS {} (allowed {}, plain torch {})".format(
            *numbers
        )
        yield f"[red]{row['level']}[/] {name}, {where}, {dtype}: max {errors}"
    yield "Triton kernels: " + (_counts(record["triton_launches"]) or "none ran")
    yield from record["notes"]
    yield ("[bold green]" if not wrong else "[bold red]") + verdict(record)


def _cells(row: dict[str, Any]) -> list[str]:
    name = row["name"] + (f" – {row['note']}" if row["note"] else "")
    keys = ("max_error", "max_budget", "torch_max", "rms_error", "rms_budget", "torch_rms")
    numbers = (f"{float(row[key]):.2e}" for key in keys)
    return [name, row["where"], row["dtype"], *numbers, "ok" if row["ok"] else "WRONG"]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))


def page(record: dict[str, Any], config: Config) -> str:
    """parity.html."""
    sections = []
    for level, rows in levels_of(record):
        curves = _curves(record["curves"]) if level == "trajectory" else ""
        sections.append(f"<h2>{_LEVELS[level]}</h2>{table(map(_cells, rows), _HEAD)}{curves}")
    for where, executed in record["executed"].items():
        ran = ((op, _counts(backends)) for op, backends in executed.items())
        sections.append(
            f"<h2>Operators that ran, {where}</h2>{table(ran, ('op', 'calls by backend'))}"
        )
    kernels = table(sorted(record["triton_launches"].items()), ("Triton kernel", "launches"))
    facts = [
        (key, record[key]) for key in ("config", "code", "device", "date", "git_sha", "command")
    ]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    head = (
        "<h1>Parity of "
        f"{escape(config.run.dir)}</h1><p><strong>{escape(verdict(record))}</strong></p>{quiet(_RULE)}"
    )
    notes = "".join(quiet(escape(note)) for note in record["notes"])
    provenance = f"<h2>Provenance</h2>{table([*facts, ('versions', versions)])}"
    body = (
        f"{head}{notes}{''.join(sections)}<h2>Triton kernels that ran</h2>{kernels}{provenance}\n"
    )
    return document("parity – sd-perf", body)


def _curves(curves: dict[str, list[float]]) -> str:
    names = list(curves)
    rows = (
        [number, *(f"{value:.6f}" for value in values)]
        for number, values in enumerate(zip(*curves.values(), strict=True), start=1)
    )
    return f"<h3>Mean loss of each window of steps</h3>{table(rows, ('window', *names))}"
