"""Benchmark results: written whole, read only where nothing is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, TypedDict

import pytest

from sd_perf.errors import UserError
from sd_perf.tools.results import REPOSITORY, Provenance, Result, read, write


class Inner(TypedDict):
    ok: bool


class Row(TypedDict):
    us: float | None
    parity: Inner


ROW: Row = {"us": 1.5, "parity": {"ok": True}}
PROVENANCE = Provenance(
    date="2026-01-01T00:00:00+00:00",
    command="python -m benchmarks.some_speed",
    git_sha=None,
    machine={"gpu": "some GPU"},
    versions={"torch": "2"},
)


def written(path: Path) -> Path:
    write(path, Result("some_speed", PROVENANCE, [ROW, ROW], {"losses": [1.0]}))
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    result = read(written(tmp_path / "x.json"), "some_speed", Row)
    assert result == Result("some_speed", PROVENANCE, [ROW, ROW], {"losses": [1.0]})
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def spoilt(data: dict[str, Any], place: str) -> str:
    *outer, key = place.split(".")
    inner: Any = data
    for name in outer:
        inner = inner[int(name) if name.isdigit() else name]
    del inner[key]
    return json.dumps(data)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("rows", "the file has no 'rows'"),
        ("provenance.date", "provenance has no 'date'"),
        ("rows.1.us", "row 2 has no 'us'"),
        ("rows.0.parity.ok", "parity of row 1 has no 'ok'"),
    ],
)
def test_a_missing_field_is_named(place: str, words: str, tmp_path: Path) -> None:
    path = written(tmp_path / "x.json")
    path.write_text(spoilt(json.loads(path.read_text()), place))
    with pytest.raises(UserError, match=rf"x\.json: is no result of some_speed\.py \({words}\)"):
        read(path, "some_speed", Row)


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "3", '{"rows": 3}', "[" * 99_999, "9" * 5000, "NaN"]
)
def test_a_damaged_file_is_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json: is no result of some_speed\.py"):
        read(tmp_path / "x.json", "some_speed", Row)
    with pytest.raises(UserError, match=r"y\.json: cannot be read \(No such file"):
        read(tmp_path / "y.json", "some_speed", Row)


def test_another_benchmarks_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it is of some_speed"):
        read(written(tmp_path / "x.json"), "kernel_speed", Row)


def test_rows_must_be_a_list(tmp_path: Path) -> None:
    path = written(tmp_path / "x.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "rows": 3}))
    with pytest.raises(UserError, match="is no result"):
        read(path, "some_speed", Row)


def test_the_command_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sys, "argv", ["/somewhere/benchmarks/some_speed.py", "--cases", "64 tokens"]
    )
    provenance = Provenance.of_this_run("some_speed", {}, {}, git_sha="abc")
    assert provenance.command == "python -m benchmarks.some_speed --cases '64 tokens'"
    assert provenance.git_sha == "abc"
    assert provenance.date.endswith("+00:00")


def test_committed_results_have_the_shape() -> None:
    class AnyRow(TypedDict):
        pass

    paths = sorted((REPOSITORY / "benchmarks/results").glob("*.json"))
    assert paths
    for path in paths:
        name = json.loads(path.read_text())["benchmark"]
        assert read(path, name, AnyRow).rows
        assert (REPOSITORY / f"benchmarks/{name}.py").is_file()
