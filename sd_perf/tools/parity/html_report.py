"""parity.html: a parity record as one page."""

from __future__ import annotations

from html import escape
from typing import Any

from sd_perf.config import Config
from sd_perf.runs.parity_record import Level, counts_in_words, rows_by_level, verdict
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
_NUMBERS = ("max_error", "max_budget", "torch_max", "rms_error", "rms_budget", "torch_rms")
_TITLES: dict[Level, str] = {
    "op": "Operators, each against its reference in float64",
    "block": "Blocks, each with the inputs of the plain network's block",
    "unet": "The whole UNet, forward",
    "grad": "Gradients, by kinds of parameters",
    "step": "The training step: draws, loss, optimizer, masters, sampler",
    "trajectory": "Loss over a few hundred steps",
    "world": "Whole runs over three seeds",
}
_RULE = (
    "Errors are the fast path's, relative to the plain path in float64. Twice plain torch's own "
    "error at the same dtype is allowed, plus four ulp of float32. Interpreter: tiny shapes, every "
    "Triton kernel in Triton's interpreter, which cannot show how a GPU rounds. Structure: the "
    "config's network on the operators that a CPU has. Gpu: full size."
)


def html_report(record: dict[str, Any], config: Config) -> str:
    """The page, as HTML: verdict, comparisons by level, what ran, provenance."""
    sections = []
    for level, rows in rows_by_level(record):
        curves = _curves(record["curves"]) if level == "trajectory" else ""
        sections.append(f"<h2>{_TITLES[level]}</h2>{table(map(_cells, rows), _HEAD)}{curves}")
    for where, executed in record["executed"].items():
        calls = ((op, counts_in_words(backends)) for op, backends in executed.items())
        sections.append(
            f"<h2>Operators that ran, {where}</h2>{table(calls, ('op', 'calls by backend'))}"
        )
    kernels = table(sorted(record["triton_launches"].items()), ("Triton kernel", "launches"))
    head = (
        f"<h1>Parity of {escape(config.run.dir)}</h1>"
        f"<p><strong>{escape(verdict(record))}</strong></p>{quiet(_RULE)}"
    )
    notes = "".join(quiet(escape(note)) for note in record["notes"])
    body = (
        f"{head}{notes}{''.join(sections)}<h2>Triton kernels that ran</h2>{kernels}"
        f"{_provenance(record)}\n"
    )
    return document("parity – sd-perf", body)


def _cells(row: dict[str, Any]) -> list[str]:
    name = row["name"] + (f" – {row['note']}" if row["note"] else "")
    numbers = (f"{float(row[key]):.2e}" for key in _NUMBERS)
    return [name, row["where"], row["dtype"], *numbers, "ok" if row["ok"] else "WRONG"]


def _curves(curves: dict[str, list[float]]) -> str:
    rows = (
        [number, *(f"{value:.6f}" for value in values)]
        for number, values in enumerate(zip(*curves.values(), strict=True), start=1)
    )
    return f"<h3>Mean loss of each window of steps</h3>{table(rows, ('window', *curves))}"


def _provenance(record: dict[str, Any]) -> str:
    facts = [
        (key, record[key]) for key in ("config", "code", "device", "date", "git_sha", "command")
    ]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"<h2>Provenance</h2>{table([*facts, ('versions', versions)])}"
