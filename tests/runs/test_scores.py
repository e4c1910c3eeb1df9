"""The scores of a run: order, repeated positions, a line that a kill cut, and damage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sd_perf.errors import UserError
from sd_perf.runs.scores import read_json_lines, read_scores


def write_scores(run: Path, *lines: dict, end: str = "") -> None:
    (run / "scores.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end)


def test_the_latest_line_of_a_position_counts_and_positions_ascend(tmp_path):
    write_scores(
        tmp_path,
        {"samples": 64, "n": 8, "fid": 3.0},
        {"samples": 32, "n": 8, "fid": 2.0},
        {"samples": 64, "n": 8, "fid": 1.0},
    )
    scores = read_scores(tmp_path)
    assert [(line["samples"], line["fid"]) for line in scores] == [(32, 2.0), (64, 1.0)]


def test_a_run_without_scores_has_none(tmp_path):
    assert read_scores(tmp_path) == []


def test_a_line_that_a_kill_cut_is_left_out(tmp_path):
    write_scores(tmp_path, {"samples": 32, "n": 8}, end='{"samples": 64, "n')
    whole = {"samples": 32, "n": 8}
    assert read_json_lines(tmp_path / "scores.jsonl", ("samples",)) == ([whole], True)
    write_scores(tmp_path, whole)
    assert read_json_lines(tmp_path / "scores.jsonl", ("samples",)) == ([whole], False)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"samples"\n{"samples": 1, "n": 2}\n', "line 1 cannot be read"),
        ('{"samples": 1}\n', "line 1 lacks a number for one of samples, n"),
        ('{"samples": "1", "n": 2}\n', "line 1 lacks a number"),
        ("[1]\n", "line 1 lacks a number"),
    ],
)
def test_damage_is_told(tmp_path, text, sentence):
    (tmp_path / "scores.jsonl").write_text(text)
    with pytest.raises(UserError, match=sentence):
        read_scores(tmp_path)
