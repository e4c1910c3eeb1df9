"""How the rows of a benchmark are shown, in a terminal and on a page: which columns, in which unit.

A column is told by its name alone, so a new benchmark is shown without a line of code here. Names
end in their unit (`_s`, `_ms`, `_bytes`, `_w`, ...); those in `TITLES` have a title of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sd_perf.tools.results import Conditions

Row = Mapping[str, Any]

TITLES = {
    "samples_per_second": "samples/s",
    "samples_per_second_first_tenth": "samples/s at first",
    "samples_per_second_per_rank": "samples/s a rank",
    "pictures_per_second": "pictures/s",
    "calls_per_second": "calls/s",
    "gb_per_second": "GB/s",
    "tflop_per_second": "TFLOP/s",
    "percent_of_copy": "% of a copy",
    "ms_per_sample": "ms a sample",
    "ms_per_iteration": "ms an iteration",
    "us": "µs",
    "ratio": "ratio",
    "mfu": "MFU, %",
    "data_wait": "data wait, %",
    "efficiency": "efficiency, %",
    "seconds": "seconds",
    "sm_clock_mhz": "SM clock, MHz",
    "power_w": "power, W",
    "temperature_c": "temperature, °C",
}
UNITS = {"s": "s", "ms": "ms", "us": "µs", "bytes": "GiB", "w": "W", "mhz": "MHz"}
"""unit by the end of a column's name"""
FRACTIONS = ("mfu", "data_wait", "efficiency")
"""columns that hold a fraction and are shown in per cent"""
CHARTED = (
    "samples_per_second",
    "pictures_per_second",
    "ratio",
    "percent_of_copy",
    "us",
    "seconds",
)
"""columns worth a chart, the most telling first"""
ABSENT = "–"
_LAST = ("status", "reason", "note", "notes")


def title(column: str) -> str:
    """A column's title, with its unit."""
    if column in TITLES:
        return TITLES[column]
    words, _, last = column.rpartition("_")
    if words and last in UNITS:
        return f"{words.replace('_', ' ')}, {UNITS[last]}"
    return column.replace("_", " ")


def shown(column: str, value: Any) -> str:
    """A value of a column as a person reads it, in the unit of its title."""
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return _number(column, value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {shown('', item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(shown("", item) for item in value) or ABSENT
    return str(value)


def _number(column: str, value: float) -> str:
    if column in FRACTIONS:
        return f"{100 * value:.1f}"
    if column.endswith("bytes"):
        return f"{value / 2**30:,.2f}"
    return f"{value:,}" if isinstance(value, int) else _rounded(value)


def _rounded(value: float) -> str:
    """Four digits, and no fewer than those before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def charted(rows: Sequence[Row]) -> list[str]:
    """The columns of these rows that a chart is drawn of, at most two."""
    found = [column for column in CHARTED if any(_is_number(row.get(column)) for row in rows)]
    return found[:2]


def labels(rows: Sequence[Row]) -> list[str]:
    """The first columns that tell the rows apart: text, whole numbers and switches that differ.

    Conditions come last, and no more columns are taken than it needs.
    """
    columns = [
        column
        for column in all_columns(rows)
        if column not in (*_LAST, *TITLES)
        and _unit_of(column) is None
        and all(isinstance(row.get(column), str | int | None) for row in rows)
    ]
    columns.sort(key=lambda column: column in Conditions.__annotations__)
    telling: list[str] = []
    groups = 1
    for column in columns:
        keys = {tuple(row.get(name) for name in (*telling, column)) for row in rows}
        if len(keys) > groups:
            telling, groups = [*telling, column], len(keys)
    return telling or columns[:1]


def same_in_all(rows: Sequence[Row]) -> dict[str, Any]:
    """The columns that have one value in all rows, where there are several; `None` left out."""
    if len(rows) < 2:
        return {}
    first = rows[0]
    return {
        column: first.get(column)
        for column in all_columns(rows)
        if column != "status" and all(row.get(column) == first.get(column) for row in rows)
    }


def table_columns(rows: Sequence[Row]) -> list[str]:
    """The columns of a table, in order: what tells the rows apart, figures, conditions, the rest.

    Columns that are the same in all rows, and curves, are not among them.
    """
    same, telling = same_in_all(rows), labels(rows)
    others = [column for column in all_columns(rows) if column not in (*same, *telling, "curve")]
    first = [column for column in (*charted(rows), *TITLES) if column in others]
    conditions = [column for column in Conditions.__annotations__ if column in others]
    last = [column for column in _LAST if column in others]
    rest = [column for column in others if column not in (*first, *conditions, *last)]
    kept = [column for column in telling if column not in same] or telling
    return list(dict.fromkeys([*kept, *first, *conditions, *rest, *last]))


def all_columns(rows: Sequence[Row]) -> list[str]:
    """Every column of any row, in the order in which they come."""
    return list(dict.fromkeys(column for row in rows for column in row))


def label(row: Row, columns: Sequence[str]) -> str:
    """What tells a row from the others, as text."""
    return " · ".join(
        _labelled(column, row[column]) for column in columns if row.get(column) not in (None, "")
    )


def _labelled(column: str, value: Any) -> str:
    """A number or a switch says nothing without its column's title; text does."""
    text = shown(column, value)
    return text if isinstance(value, str) else f"{title(column)} {text}"


def line(row: Row, telling: Sequence[str]) -> str:
    """A row as one line of text: what it is, then its figures or why it has none."""
    name = label(row, telling)
    if row.get("status", "measured") != "measured":
        return f"{name}: {row['status']}: {row.get('reason')}"
    figures = [
        f"{title(column)} {shown(column, row[column])}"
        for column in dict.fromkeys([*TITLES, *row])
        if (column in TITLES or _unit_of(column)) and _is_number(row.get(column))
    ]
    return f"{name}: {', '.join(figures)}"


def _unit_of(column: str) -> str | None:
    return UNITS.get(column.rpartition("_")[2])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
