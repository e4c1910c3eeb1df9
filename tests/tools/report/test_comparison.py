"""`sd-perf compare`: what differs between runs, and that the page trusts none of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from sd_perf.errors import UserError
from sd_perf.tools.report.comparison import (
    config_differences,
    ground_differences,
    names,
    read_runs,
    results,
)
from sd_perf.tools.report.comparison_page import write_page
from tests.tools.report.test_report import HOSTILE, write_bare, write_full, write_lines


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    """A complete run with scores, and a shorter one of another batch without."""
    training = {"max_samples": 6400, "global_batch_size": 32, "seed": 7}
    return [write_full(tmp_path / "a"), write_bare(tmp_path / "b", training=training)]


def test_what_differs(two: list[Path]) -> None:
    runs = read_runs(two)
    told = {row[0]: row[1:] for row in results(runs)}
    assert told["samples"] == ["6,400", "2,560 of 6,400"]
    assert told["loss at 2,560 samples"][0] == told["loss at 2,560 samples"][1]
    assert told["FID"] == ["12.35 (at 6,400, n 256)", "–"]
    assert "damaged lines, left out" not in told
    assert config_differences(runs) == [
        ["training.global_batch_size", "64", "32"],
        ["training.seed", "none", "7"],
    ]
    assert ground_differences(runs) == [["kernel group_norm", "torch", "–"]]


def test_scores_are_compared_at_one_position_and_equal_n(two: list[Path]) -> None:
    line = {"samples": 6400, "fid": 9.0, "n": 256}
    write_lines(two[1] / "scores.jsonl", [line, {"samples": 3200, "fid": 50.0, "n": 100}])
    told = {row[0]: row[1:] for row in results(read_runs(two))}
    assert told["FID at 6,400, n 256"] == ["12.35", "9.00"]
    assert not any(name.startswith("FID at 3,200") for name in told)


def test_scores_of_the_average_have_rows_and_a_figure_of_their_own(two, tmp_path: Path) -> None:
    for run, fid in zip(two, (9.0, 8.0), strict=True):
        write_lines(run / "scores_ema.jsonl", [{"samples": 3200, "fid": fid, "n": 256}])
    runs = read_runs(two)
    told = {row[0]: row[1:] for row in results(runs)}
    assert told["FID of the average at 3,200, n 256"] == ["9.00", "8.00"]
    assert told["FID"] == ["12.35 (at 6,400, n 256)", "–"]
    assert "CLIP score of the average" not in told
    write_page(runs, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count('<img class="chart"') == 4
    assert 'alt="FID of the average (lower is better) over samples"' in page


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    for parent in ("x", "y"):
        (tmp_path / parent).mkdir()
    paths = [write_bare(tmp_path / place) for place in ("x/run", "y/run", "other")]
    runs = read_runs(paths)
    assert names(runs) == [str(paths[0]), str(paths[1]), "other"]


@pytest.mark.parametrize("count", [0, 1, 9])
def test_two_to_eight(count: int, tmp_path: Path) -> None:
    run = write_bare(tmp_path / "run")
    with pytest.raises(UserError, match=f"{count} run folders given; give two to 8"):
        read_runs([run] * count)


def test_the_command(two: list[Path], tmp_path: Path, sd_perf) -> None:
    page = tmp_path / "page.html"
    code, output, _ = sd_perf("compare", *two, "--output", page)
    assert code == 0 and output.splitlines()[-1] == str(page)
    assert "training.seed" in output and "12.35 (at 6,400, n 256)" in output
    html = page.read_text(encoding="utf-8")
    assert html.count('<img class="chart"') == 3 and "training.seed" in html


def test_a_damaged_run_is_one_sentence(two: list[Path], tmp_path: Path, refused) -> None:
    (two[1] / "kernels.json").write_text('[{"op": 3}]')
    page = tmp_path / "page.html"
    assert "kernels.json: is no list of kernel choices" in refused(
        "compare", *two, "--output", page
    )
    assert not page.exists()


def test_damaged_lines_are_counted(two: list[Path]) -> None:
    with (two[1] / "metrics.jsonl").open("a") as file:
        file.write("nonsense\n{}\n{}\n")
    told = {row[0]: row[1:] for row in results(read_runs(two))}
    assert told["damaged lines, left out"] == ["–", "3"]


def test_runs_that_have_nothing_yet(tmp_path: Path) -> None:
    runs = [write_bare(tmp_path / name) for name in ("a", "b")]
    for run in runs:
        (run / "metrics.jsonl").unlink()
    write_page(read_runs(runs), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "The configs are the same." in text and "No run has logged" in text


def test_nothing_in_a_folder_becomes_markup(two: list[Path], tmp_path: Path) -> None:
    manifest = json.loads((two[0] / "run_manifest.json").read_text())
    manifest["config"][HOSTILE] = {HOSTILE: HOSTILE}
    manifest["versions"] = {HOSTILE: HOSTILE}
    manifest["machine"] = {"cpus": HOSTILE}
    (two[0] / "run_manifest.json").write_text(json.dumps(manifest))
    hostile = two[0].rename(tmp_path / "_$x_1$ <b>&")
    write_page(read_runs([hostile, two[1]]), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "&lt;script&gt;" in page
    assert {"script", "a", "link", "iframe", "b"}.isdisjoint(re.findall(r"<(\w+)", page))
    assert all(tag.count("data:image/svg") == 1 for tag in re.findall("<img[^>]*>", page))
