"""benchmarks.html: every result of a folder, damaged files named, and nothing trusted."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from sd_perf.errors import UserError
from sd_perf.tools.report.benchmarks import MOST_BARS, write_benchmarks
from sd_perf.tools.result_table import charted, label, labels, line, shown, table_columns, title
from sd_perf.tools.results import REPOSITORY, Provenance, Result, write
from tests.tools.report.test_report import HOSTILE

PROVENANCE = Provenance(
    date="2026-01-01T00:00:00+00:00",
    command="python -m benchmarks.ladder --tiny",
    git_sha="0123456789abcdef-dirty",
    machine={"cpu": "some CPU", "threads": 2},
    versions={"torch": "2.13.0"},
)
CURVE = {"samples": [64, 128, 192], "samples_per_second": [10.0, 20.0, 15.0]}


def row(rung: str, rate: float | None, **columns: Any) -> dict[str, Any]:
    status = "measured" if rate else "absent"
    conditions = {"batch": 4, "dtype": "fp32", "cached": "moments"}
    known = {"rung": rung, "samples_per_second": rate, "data_wait": 0.125, "status": status}
    return {**conditions, **known, "reason": None if rate else "needs a GPU", **columns}


ROWS = [row("plain", 100.0, curve=CURVE), row("fused", 1234.5), row("graph", None)]


def write_result(path: Path, rows: list[dict[str, Any]], name: str = "ladder") -> None:
    write(path, Result(name, PROVENANCE, rows, {"note": HOSTILE, "checks": list(range(20))}))


def page_of(folder: Path) -> str:
    return write_benchmarks(folder).read_text(encoding="utf-8")


def test_every_result_has_its_conditions_charts_and_rows(tmp_path: Path) -> None:
    write_result(tmp_path / "ladder.json", ROWS)
    write_result(tmp_path / "other.json", [row("alone", 1.0)], name="scaling")
    page = page_of(tmp_path)
    assert page.index("<h2>ladder</h2>") < page.index("<h2>scaling</h2>")
    for fact in ("cpu some CPU", "0123456789ab-dirty", "benchmarks.ladder --tiny", "torch 2.13.0"):
        assert fact in page
    bars = re.findall(r"<dt>(.*?)</dt><dd><i style=\"width: (.*?)%\"></i><span>(.*?)</span>", page)
    assert bars == [("plain", "6.97", "100"), ("fused", "86.00", "1,234"), ("alone", "86.00", "1")]
    assert page.count('<img class="chart"') == 1 and "needs a GPU" in page
    assert "20 entries, in the file" in page and "data wait, % 12.5" in page
    assert "2 results, 4 rows" in page and "Damaged" not in page


def test_a_damaged_file_is_named_and_the_rest_drawn(tmp_path: Path) -> None:
    write_result(tmp_path / "ladder.json", ROWS)
    whole = json.loads((tmp_path / "ladder.json").read_text())
    (tmp_path / "cut.json").write_text(json.dumps(whole)[:-40])
    del whole["rows"][1]["cached"]
    (tmp_path / "mute.json").write_text(json.dumps(whole))
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "lost.json").symlink_to("nowhere")
    page = page_of(tmp_path)
    assert page.count("<li>") == 5 and "<h2>ladder</h2>" in page
    assert "mute.json: is no result of a benchmark (row 2 does not say what is cached)" in page
    assert "folder.json: cannot be read (it is a folder)" in page


def test_all_files_damaged_is_a_page_too(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    assert "0 results, 0 rows" in page_of(tmp_path)


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_folder_without_results(name: str, tmp_path: Path, refused: Any) -> None:
    sentence = refused("report", "benchmarks", tmp_path / name)
    assert "holds no results (*.json)" in sentence


def test_the_command_prints_the_page(tmp_path: Path, sd_perf: Any) -> None:
    write_result(tmp_path / "ladder.json", ROWS)
    code, output, _ = sd_perf("report", "benchmarks", tmp_path)
    assert code == 0 and output.strip() == str(tmp_path / "benchmarks.html")


def test_nothing_in_a_file_becomes_markup(tmp_path: Path) -> None:
    odd: Any = {"curve": {"samples": [1], "samples_per_second": [1.0, 2.0]}, HOSTILE: HOSTILE}
    rows = [row(HOSTILE, 1.0, **odd), row("b", 2.0, curve=CURVE)]
    write_result(tmp_path / "x.json", rows, name=HOSTILE)
    page = page_of(tmp_path)
    assert "&lt;script&gt;" in page
    assert {"script", "a", "link", "iframe"}.isdisjoint(re.findall(r"<(\w+)", page))
    assert all(tag.count("data:image/svg") == 1 for tag in re.findall("<img[^>]*>", page))


def test_what_is_not_proven_right_is_in_no_chart(tmp_path: Path) -> None:
    write_result(tmp_path / "x.json", [row("a", 1.0), row("b", 9.0, status="unproven")])
    page = page_of(tmp_path)
    assert re.findall("<dt>(.*?)</dt>", page) == ["a"] and "<td>unproven</td>" in page


def test_many_rows_are_bounded(tmp_path: Path) -> None:
    write_result(tmp_path / "x.json", [row(f"rung {i}", i + 1.0) for i in range(500)])
    page = page_of(tmp_path)
    assert page.count("<dt>") == MOST_BARS and "100 more rows are in the file" in page


def test_columns_are_told_by_their_names() -> None:
    assert [title(name) for name in ("build_s", "peak_memory_bytes", "world_size", "us")] == [
        "build, s",
        "peak memory, GiB",
        "world size",
        "µs",
    ]
    values = [shown("mfu", 0.354), shown("x_bytes", 2**31), shown("x", 12345.6), shown("x", None)]
    assert values == ["35.4", "2.00", "12,346", "–"]
    assert labels(ROWS) == ["rung"] and charted(ROWS) == ["samples_per_second"]
    assert table_columns(ROWS) == ["rung", "samples_per_second", "status", "reason"]


def test_no_more_labels_than_tell_rows_apart() -> None:
    rows = [row("a", 1.0, world=1), row("a", 2.0, world=2, batch=8), row("b", None, world=1)]
    assert labels(rows) == ["rung", "world"]
    assert label(rows[1], labels(rows)) == "a · world 2"
    assert line(rows[2], labels(rows)) == "b · world 1: absent: needs a GPU"
    assert line(rows[0], labels(rows)).startswith("a · world 1: samples/s 1, data wait, % 12.5")


def test_the_committed_results_make_a_page(tmp_path: Path) -> None:
    for path in (REPOSITORY / "benchmarks/results").glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert "Damaged" not in page_of(tmp_path)


def test_a_disk_that_refuses(tmp_path: Path) -> None:
    write_result(tmp_path / "x.json", ROWS)
    (tmp_path / "benchmarks.html").mkdir()
    (tmp_path / "benchmarks.html/file").touch()
    with pytest.raises(UserError, match=r"benchmarks\.html cannot be written"):
        write_benchmarks(tmp_path)
