"""The scores of a run, and how its files of JSON lines are read.

`scores.jsonl` has one JSON object per evaluated checkpoint: `samples` (its position), `fid`,
`clip`, `n` (pictures) and, in the tiny world, the judge's shares.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sd_perf.errors import UserError
from sd_perf.files import one_line


def read_scores(folder: Path, keys: tuple[str, ...] = ("samples", "n")) -> list[dict[str, Any]]:
    """The lines of a run's `scores.jsonl`, by ascending position; [] where there is no file.

    Where a position was evaluated more than once, the last line counts. Raises UserError for a line
    without a number for one of `keys`.
    """
    lines, _ = read_json_lines(folder / "scores.jsonl", keys)
    by_position = {line["samples"]: line for line in lines}
    return [by_position[samples] for samples in sorted(by_position)]


def read_json_lines(path: Path, keys: tuple[str, ...]) -> tuple[list[dict[str, Any]], bool]:
    """Read a file with one JSON object per line.

    Returns the objects, and whether an incomplete last line, as a killed process leaves it, was
    left out. Raises UserError for any other damage, and for a line without a number for one of
    `keys`.
    """
    if not path.is_file():
        return [], False
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({one_line(error)}); restore it from a copy"
        ) from error
    objects: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                return objects, True
            raise UserError(
                f"{path}: line {number} cannot be read ({one_line(error)}); mend or remove it"
            ) from error
        if not (
            isinstance(value, dict) and all(isinstance(value.get(key), int | float) for key in keys)
        ):
            raise UserError(
                f"{path}: line {number} lacks a number for one of {', '.join(keys)}; mend or "
                "remove it"
            )
        objects.append(value)
    return objects, False
