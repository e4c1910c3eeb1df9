"""The tables of `sd-perf compare` for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from sd_perf.tools.report.comparison import (
    Row,
    config_differences,
    ground_differences,
    names,
    results,
)
from sd_perf.tools.report.run_contents import RunContents
from sd_perf.visible import visible


def tables(runs: Sequence[RunContents]) -> Iterator[Table | str]:
    """Results, then what differs; a sentence in place of an empty table."""
    titles = [visible(name) for name in names(runs)]
    yield _table("results", results(runs), titles)
    different = config_differences(runs)
    yield _table("configs", different, titles) if different else "the configs are the same"
    ground = ground_differences(runs)
    if ground:
        yield _table("ground", ground, titles)


def _table(name: str, rows: list[Row], titles: list[str]) -> Table:
    table = Table(title=name, title_justify="left")
    for title in ("", *titles):
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*map(visible, row))
    return table
