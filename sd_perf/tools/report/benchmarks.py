"""DIR/benchmarks.html: whatever results of benchmarks lie in a folder, in one file to pass on."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from sd_perf.errors import UserError
from sd_perf.files import disk_errors, misfit, one_line, write_text
from sd_perf.optional import optional
from sd_perf.tools.html import document, figure, quiet, table
from sd_perf.tools.report.charts import Panel, chart
from sd_perf.tools.result_table import (
    Row,
    charted,
    label,
    labels,
    same_in_all,
    shown,
    table_columns,
    title,
)
from sd_perf.tools.results import Result, read_any

PAGE = "benchmarks.html"
MOST_BARS, MOST_ROWS = 40, 400
"""bars of a chart and rows of a table, at most; more would be skipped by a reader, too"""
_OF_PAIRS = " The rival's time over the side's: above 1 the side is faster."
_CURVE = {"samples": [float], "samples_per_second": [float]}


def write_benchmarks(folder: Path) -> Path:
    """Write `benchmarks.html` of a folder, from its *.json; returns its path.

    A file that is damaged, or no result, is named on the page and left out. UserError for a folder
    without JSON files, or a disk that refuses; ConfigError where matplotlib is missing and a result
    has a curve.
    """
    paths = sorted(folder.glob("*.json")) if folder.is_dir() else []
    if not paths:
        raise UserError(
            f"{folder}: holds no results (*.json); python -m benchmarks.NAME --output writes them"
        )
    results, damaged = _read(paths)
    sections = "".join(_section(path, result) for path, result in results)
    name = escape(folder.resolve().name)
    body = f"<h1>{name}</h1>\n{_head(results)}\n{_damaged(damaged)}\n{sections}"
    page = folder / PAGE
    with disk_errors(page, "make room there, then make the report again"):
        write_text(page, document(f"{name} – benchmarks – sd-perf", body))
    return page


def _read(paths: Sequence[Path]) -> tuple[list[tuple[Path, Result[Any]]], list[str]]:
    """The results by path, and a sentence for each file that is none."""
    results, damaged = [], []
    for path in paths:
        try:
            results.append((path, read_any(path)))
        except UserError as error:
            damaged.append(one_line(error).removeprefix(f"{path.parent}/"))
    return results, damaged


def _head(results: Sequence[tuple[Path, Result[Any]]]) -> str:
    rows = sum(len(result.rows) for _, result in results)
    counted = f"{len(results)} result{'s' if len(results) != 1 else ''}, {rows:,} rows."
    how = "Compare figures of the same hardware; ratios are of the same run."
    return f"<p>{counted} {how}</p>"


def _damaged(sentences: Sequence[str]) -> str:
    if not sentences:
        return ""
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    return f'<div class="note"><strong>Damaged, and left out:</strong><ul>{items}</ul></div>'


def _section(path: Path, result: Result[Any]) -> str:
    """A result: under which conditions, then its charts, then its rows."""
    # A benchmark may have several files, and most are named after it.
    heading = path.stem if path.stem.startswith(result.benchmark) else result.benchmark
    parts = [f"<h2>{escape(heading)}</h2>", _provenance(path, result)]
    if not result.rows:
        parts.append(quiet("No rows."))
    else:
        parts += [_bars(result.rows, column) for column in charted(result.rows)]
        parts += [_curve(row, labels(result.rows)) for row in result.rows]
        parts += [_same(result.rows), _table(result.rows)]
    return "\n".join([*parts, _details(result.details)])


def _provenance(path: Path, result: Result[Any]) -> str:
    source = result.provenance
    commit = source.git_sha or ""
    if len(commit) > 12:  # the whole one is in the file
        commit = commit[:12] + ("-dirty" if commit.endswith("-dirty") else "")
    facts = [
        ("hardware", shown("", source.machine)),
        ("versions", shown("", source.versions)),
        ("commit", f"{commit}, {source.date.replace('T', ' ').replace('+00:00', ' UTC')}"),
        ("command", source.command),
        ("file", path.name),
    ]
    return table(facts)


def _bars(rows: Sequence[Row], column: str) -> str:
    """A horizontal bar, from 0 on, for each measured row that has a number in the column.

    Rows of another status, as timings of code that is not proven right, are in the table alone.
    """
    telling = labels(rows)
    values = [
        (label(row, telling), float(row[column]))
        for row in rows
        if misfit(row.get(column), float) == "" and row.get("status", "measured") == "measured"
    ]
    longest = max((value for _, value in values), default=0.0)
    bars = "".join(
        f"<dt>{escape(name)}</dt><dd>{_bar(value, longest)}"
        f"<span>{escape(shown(column, value))}</span></dd>"
        for name, value in values[:MOST_BARS]
    )
    left_out = len(values) - MOST_BARS
    more = f" The first {MOST_BARS} rows; {left_out} more are in the table." if left_out > 0 else ""
    of_pairs = column == "ratio" and "side_s" in rows[0]
    caption = f"Bars: {escape(title(column))}.{_OF_PAIRS * of_pairs}{more}"
    return figure(f'<dl class="bars">{bars}</dl>', caption)


def _bar(value: float, longest: float) -> str:
    percent = 100 * max(value, 0.0) / longest if longest > 0 else 0.0
    # The number stands beside its bar, so the longest one leaves it room.
    return f'<i style="width: {0.86 * percent:.2f}%"></i>'


def _curve(row: Row, telling: Sequence[str]) -> str:
    """The rate over a row's run, where it holds one."""
    curve: Any = row.get("curve")
    if misfit(curve, _CURVE) or len(curve["samples"]) != len(curve["samples_per_second"]):
        return ""
    if not curve["samples"]:
        return ""
    optional("matplotlib", "a chart needs matplotlib", "report")
    rate = Panel(
        "throughput (samples/s)", curve["samples"], curve["samples_per_second"], from_zero=True
    )
    name = escape(label(row, telling))
    caption = f"{name}: points are windows of the run after its warm-up; the line is their median."
    return figure(chart([rate], f"throughput over samples, {name}"), caption)


def _same(rows: Sequence[Row]) -> str:
    facts = [
        f"{title(column)} {shown(column, value)}"
        for column, value in same_in_all(rows).items()
        if value is not None and column != "curve"
    ]
    return quiet(f"The same in all rows: {escape('; '.join(facts))}.") if facts else ""


def _table(rows: Sequence[Row]) -> str:
    columns = table_columns(rows)
    cells = [[shown(column, row.get(column)) for column in columns] for row in rows[:MOST_ROWS]]
    head = tuple(escape(title(column)) for column in columns)
    more = len(rows) - MOST_ROWS
    note = quiet(f"{more:,} more rows are in the file.") if more > 0 else ""
    return f'<div class="wide">{table(cells, head)}</div>{note}'


def _details(details: dict[str, Any]) -> str:
    """Findings beside the rows: those of one line as they are, of longer ones how many they are."""
    facts = []
    for name, value in details.items():
        many = isinstance(value, list | dict) and len(value) > 8
        facts.append(
            (title(name), f"{len(value)} entries, in the file" if many else shown("", value))
        )
    return table(facts) if facts else ""
