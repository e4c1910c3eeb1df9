"""Reads the prompts of an evaluation."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from sd_perf.errors import DataError
from sd_perf.files import one_line, parse_json, untrusted_text

_REMEDY = "evaluation.prompts names a .tsv or a captions.jsonl"
_END = "\0end"
"""row after a table's last: a quote left open swallows it"""


def read_prompts(path: Path, num: int) -> list[str]:
    """The first `num` captions of a .tsv file with a column `caption`, or of a captions.jsonl.

    A .tsv is read as `pandas.read_csv(sep="\\t")`, the benchmark's reader, reads it: a quoted field
    may hold tabs, line breaks and doubled quotes. Text that pandas takes for a missing value, such
    as "null", stays text. Of a captions.jsonl the first caption of each line is taken.

    Raises DataError, with the line, for an entry without a caption, and for a file that is missing,
    of another kind, or too short.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; {_REMEDY}")
    read = _read_table if path.suffix == ".tsv" else _read_json_lines
    lines = untrusted_text(path, remedy=_REMEDY, kind=DataError, encoding="utf-8-sig", newline="")
    prompts: list[str] = []
    held = 0
    try:
        for held, (line, entry) in enumerate(read(lines, path), 1):
            caption = _require_caption(path, line, entry)
            if held <= num:
                prompts.append(caption)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"{path}: not a .tsv with a column `caption`, nor a captions.jsonl ({one_line(error)})"
        ) from error
    if held < num:
        raise DataError(f"{path}: holds {held} captions, and evaluation.num_prompts is {num}")
    return prompts


def _read_table(lines: Iterable[str], path: Path) -> Iterator[tuple[int, object]]:
    """(number of its first line, caption) of each row of a tab-separated table."""
    reader = csv.reader(chain(lines, [_END]), delimiter="\t")
    header = next(reader)
    if "caption" not in header:
        raise DataError(f"{path}: not a .tsv with a column `caption`; its first line names columns")
    column, start = header.index("caption"), reader.line_num + 1
    for row in reader:
        line, start = start, reader.line_num + 1
        if row == [_END]:
            return
        if row and row[-1].endswith(_END):
            raise DataError(f"{path}: line {line} opens a quote that nothing closes")
        if row and len(row) != len(header):
            raise DataError(
                f"{path}: line {line} has {len(row)} columns, and the first line names "
                f"{len(header)}; quote a caption that holds tabs"
            )
        if row:
            yield line, row[column]


def _read_json_lines(lines: Iterable[str], path: Path) -> Iterator[tuple[int, object]]:
    """(line number, first caption) of each line of a captions.jsonl."""
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            entry = parse_json(text)
        except ValueError as error:
            raise DataError(f"{path}: line {number} is not JSON ({one_line(error)})") from error
        yield number, _first_caption(entry)


def _first_caption(entry: object) -> object:
    """The first of the list `captions`, else `caption`; None where an entry has neither."""
    if not isinstance(entry, dict):
        return None
    if "captions" not in entry:
        return entry.get("caption")
    captions = entry["captions"]
    # Text is no list of captions: its first would be a letter.
    return captions[0] if isinstance(captions, list) and captions else None


def _require_caption(path: Path, line: int, caption: object) -> str:
    """The caption; DataError where it is not text, blank, or text that UTF-8 cannot hold."""
    if not isinstance(caption, str) or not caption.strip():
        raise DataError(
            f"{path}: line {line} has no caption; it needs text as `caption`, or in a list "
            "`captions`"
        )
    if any("\ud800" <= letter <= "\udfff" for letter in caption):
        raise DataError(f"{path}: line {line} has half of a surrogate pair in its caption")
    return caption
