"""Reads the prompts of an evaluation."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from sd_perf.errors import DataError
from sd_perf.files import one_line


def read_prompts(path: Path, num: int) -> list[str]:
    """The first `num` captions of a .tsv file with a column `caption`, or of a captions.jsonl.

    Of a captions.jsonl it takes the first caption of each line. Raises DataError for a file that is
    missing, of another kind, or too short.
    """
    if not path.is_file():
        raise DataError(
            f"{path}: no such file; evaluation.prompts names a .tsv or a captions.jsonl"
        )
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".tsv":
                prompts = [
                    row["caption"]
                    for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
                ]
            else:
                prompts = [_first_caption(json.loads(line)) for line in file if line.strip()]
    except (UnicodeDecodeError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(
            f"{path}: not a .tsv with a column `caption`, nor a captions.jsonl ({one_line(error)})"
        ) from error
    if len(prompts) < num:
        raise DataError(
            f"{path}: holds {len(prompts)} captions, and evaluation.num_prompts is {num}"
        )
    return prompts[:num]


def _first_caption(entry: dict) -> str:
    return entry["captions"][0] if "captions" in entry else entry["caption"]
