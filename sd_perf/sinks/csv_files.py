"""train.csv, scores.csv, scores_ema.csv and pictures.csv in the run folder, for spreadsheets."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from sd_perf.sinks.sink import SinkRun


class CsvSink:
    """A file per group with a row per position. Each start of the run writes them anew."""

    keeps_values = False

    def __init__(self, run: SinkRun) -> None:
        self._folder = run.folder
        self._files: dict[str, TextIO] = {}
        self._columns: dict[str, list[str]] = {}

    def values(self, group: str, samples: int, values: Mapping[str, float]) -> None:
        self._write(group, {"samples": samples, **values})

    def picture(self, samples: int, path: Path) -> None:
        self._write("pictures", {"samples": samples, "file": path.relative_to(self._folder)})

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _write(self, group: str, row: dict[str, Any]) -> None:
        columns = self._columns.get(group, [])
        if new := [key for key in row if key not in columns]:
            self._columns[group] = columns = [*columns, *new]
            self._files[group] = self._begin(group, columns)
        csv.DictWriter(self._files[group], columns).writerow(row)

    def _begin(self, group: str, columns: list[str]) -> TextIO:
        """The group's file, open at its end, with these columns and the rows written so far."""
        path, rows = self._folder / f"{group}.csv", []
        if group in self._files:
            self._files.pop(group).close()
            with path.open(newline="", encoding="utf-8") as file:
                rows = list(csv.DictReader(file))
        file = path.open("w", newline="", encoding="utf-8", buffering=1)
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
        return file
