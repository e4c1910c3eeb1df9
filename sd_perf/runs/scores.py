"""The scores of a run, and how its files of JSON lines are read.

`scores.jsonl` has one JSON object per evaluated checkpoint: `samples` (its position), `fid`,
`clip`, `n` (pictures), `precision` (fp32 or bf16) and, in the tiny world, the judge's shares.
`scores_ema.jsonl` has the same of the average of the weights, `training.ema_decay`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_perf.errors import UserError
from sd_perf.files import is_absent, one_line, parse_json, untrusted_lines

_WHOLE = ("samples", "n")
"""keys of counts: whole numbers, 0 or more"""
AVERAGE = "ema_"
"""how keys of the average's scores begin, where they stand beside those of the weights"""
_LARGEST = 1e39
"""larger numbers are damage: none of float32, in which losses and scores are computed, is"""


@dataclass(frozen=True)
class JsonLines:
    """A file of JSON objects, a line each: those that can be used, apart from the damaged ones."""

    objects: list[dict[str, Any]]
    damaged: list[str]
    """what is wrong with each damaged line: its number and the reason"""
    torn: bool
    """whether the last line is incomplete, as a killed process leaves it; it is in neither list"""


def scores_path(folder: Path, ema: bool = False) -> Path:
    """The file of a run's scores, those of its weights or, with `ema`, of their average."""
    return folder / ("scores_ema.jsonl" if ema else "scores.jsonl")


def read_scores(
    folder: Path, keys: tuple[str, ...] = _WHOLE, ema: bool = False
) -> list[dict[str, Any]]:
    """The lines of a run's `scores_path`, by ascending position; [] where there is no file.

    Where a position was evaluated more than once, the last line counts. Raises UserError for a line
    without a number for one of `keys`.
    """
    lines, _ = read_json_lines(scores_path(folder, ema), keys)
    return by_position(lines)


def sort_out_scores(folder: Path) -> JsonLines:
    """All scores of a run, where lines may be damaged: its weights' and their average's.

    Those of the average have keys that begin with `AVERAGE`, and lines of their own; lines are by
    ascending position, the weights' first. A damaged line is named with its file.
    """
    found = JsonLines([], [], torn=False)
    for ema in (False, True):
        path = scores_path(folder, ema)
        lines = sort_out_lines(path, _WHOLE)
        renamed = [_of_average(line) if ema else line for line in by_position(lines.objects)]
        found = JsonLines(
            sorted([*found.objects, *renamed], key=lambda line: line["samples"]),
            [*found.damaged, *(f"{path.name} {fault}" for fault in lines.damaged)],
            found.torn or lines.torn,
        )
    return found


def rounded(lines: Iterable[dict[str, Any]]) -> bool:
    """Whether lines of scores, or of the average's, are of pictures that were drawn in bf16."""
    keys = ("precision", f"{AVERAGE}precision")
    return "bf16" in (line.get(key) for line in lines for key in keys)


def _of_average(line: dict[str, Any]) -> dict[str, Any]:
    return {key if key in _WHOLE else f"{AVERAGE}{key}": value for key, value in line.items()}


def by_position(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of scores by ascending position, the last one of each position."""
    latest = {line["samples"]: line for line in lines}
    return [latest[samples] for samples in sorted(latest)]


def read_json_lines(path: Path, keys: tuple[str, ...]) -> tuple[list[dict[str, Any]], bool]:
    """Read a file with one JSON object per line.

    Returns the objects, and whether an incomplete last line, as a killed process leaves it, was
    left out. Raises UserError for any other damage, and for a line without a number for one of
    `keys`.
    """
    lines = sort_out_lines(path, keys)
    if lines.damaged:
        raise UserError(f"{path}: {lines.damaged[0]}; mend or remove it")
    return lines.objects, lines.torn


def sort_out_lines(path: Path, keys: tuple[str, ...]) -> JsonLines:
    """Read a file with one JSON object per line, where lines may be damaged; see `JsonLines`.

    No file gives no lines. Raises UserError for a file that cannot be read at all.
    """
    if is_absent(path):
        return JsonLines([], [], torn=False)
    objects: list[dict[str, Any]] = []
    damaged: list[str] = []
    torn = ""  # the reason against the latest line, while that may be the last one
    for number, line in enumerate(untrusted_lines(path), 1):
        if torn:
            damaged.append(torn)
        torn = ""
        try:
            value = parse_json(line)
        except ValueError as error:
            torn = f"line {number} cannot be read ({one_line(error)})"
            continue
        if isinstance(value, dict) and all(is_number(key, value.get(key)) for key in keys):
            objects.append(value)
        else:
            damaged.append(f"line {number} lacks a number for one of {', '.join(keys)}")
    return JsonLines(objects, damaged, torn=bool(torn))


def is_number(key: str, value: Any) -> bool:
    """Whether a value from JSON can stand for a key; true and false are no numbers."""
    if key in _WHOLE:
        return type(value) is int and value >= 0
    return type(value) in (int, float) and abs(value) < _LARGEST
