"""report.html: what it tells of a full and of a bare run, that it is one file, and that it trusts
nothing it reads."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sd_perf.cli import main
from sd_perf.config import Config
from sd_perf.errors import ConfigError
from sd_perf.tools.report.charts import running_median
from sd_perf.tools.report.run_contents import read_run
from sd_perf.tools.report.write_report import write_report

HOSTILE = (
    "</td><script>alert(1)</script><img src=http://example.com/x onerror=alert(2)> \" ' & $x_1$"
)
COMMAND = "sd-perf train --config configs/smoke.yaml --resume"


def write_lines(path: Path, objects: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in objects))


def write_bare(folder: Path, steps: int = 40, **config: dict[str, Any]) -> Path:
    """A run of 64 samples a logged step, stopped before its end of 6,400, with a config of defaults
    and changes."""
    tree = dataclasses.asdict(Config())
    changes = {"training": {"max_samples": 6400, "global_batch_size": 64}, **config}
    tree = {section: {**keys, **changes.get(section, {})} for section, keys in tree.items()}
    machine = {"platform": "Linux-6.1", "cpus": 2, "gpus": []}
    start = {
        "time": "2026-05-01T10:00:00+00:00",
        "host": "anna",
        "command": "sd-perf train --config configs/smoke.yaml",
    }
    manifest = {
        "config": tree,
        "versions": {"torch": "2.13.0"},
        "git_sha": "abc123",
        "machine": machine,
    }
    folder.mkdir()
    (folder / "run_manifest.json").write_text(
        json.dumps({**manifest, "starts": [start, {**start, "command": COMMAND}]})
    )
    lines = [
        {
            "samples": 64 * i,
            "loss": 1 / i,
            "lr": 1e-4,
            "samples_per_second": 50.0,
            "data_wait": 0.01 * (i % 3),
        }
        for i in range(1, steps + 1)
    ]
    write_lines(folder / "metrics.jsonl", lines)
    return folder


def write_grid(run: Path, samples: int, prompts: list[str] | None) -> Path:
    """A grid of 3 columns of pictures of 16 pixels, the i-th of colour (40 i, 0, 0)."""
    pixels = np.zeros((2, 16, 3, 16, 3), np.uint8)
    pixels[..., 0] = 40 * np.arange(6).reshape(2, 1, 3, 1)
    path = run / "samples" / f"samples_{samples:010d}.png"
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels.reshape(32, 48, 3)).save(path)
    if prompts is not None:
        path.with_suffix(".json").write_text(json.dumps({"prompts": prompts, "columns": 3}))
    return path


def write_full(folder: Path, prompt: str = "a red ball", **config: dict[str, Any]) -> Path:
    run = write_bare(folder, steps=100, **config)
    for samples in (3200, 6400):
        (run / "checkpoints" / f"samples_{samples:010d}").mkdir(parents=True)
        write_grid(run, samples, [f"{prompt} {i}" for i in range(5)])
    scores = [{"samples": 3200, "fid": 40.5, "clip": 0.1, "judge": 0.25, "n": 256}]
    write_lines(
        run / "scores.jsonl",
        [*scores, {"samples": 6400, "fid": 12.345, "clip": 0.3, "judge": 0.875, "n": 256}],
    )
    verdict = {"division": "open", "ruleset": "5.0.0", "passed": True, "words": f"passes, {prompt}"}
    (run / "mlperf_verdict.json").write_text(json.dumps(verdict))
    passed_over = {"triton": f"needs a GPU, {prompt}"}
    kernels = [
        {"op": "group_norm", "backend": "torch", "wanted": "auto", "passed_over": passed_over}
    ]
    (run / "kernels.json").write_text(json.dumps(kernels))
    return run


@pytest.fixture(scope="module")
def full_run(tmp_path_factory) -> Path:
    """`write_full`, with its report.html."""
    run = write_full(tmp_path_factory.mktemp("full") / "run")
    write(run)
    return run


@pytest.fixture
def full_page(full_run) -> str:
    return (full_run / "report.html").read_text(encoding="utf-8")


def write(run: Path) -> str:
    path = write_report(run)
    assert path == run / "report.html"
    return path.read_text(encoding="utf-8")


def words(page: str) -> str:
    """The text a reader sees."""
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body)))


def data(page: str, kind: str) -> list[bytes]:
    """The images in the page."""
    return [
        base64.b64decode(text)
        for text in re.findall(rf'="data:image/{re.escape(kind)};base64,([^"]+)"', page)
    ]


def test_scores_of_the_average(tmp_path):
    run = write_full(tmp_path / "run")
    lines = [{"samples": n, "fid": 9.25, "clip": 0.4, "n": 100} for n in (3200, 6400)]
    write_lines(run / "scores_ema.jsonl", [*lines, {"samples": "x"}, {"samples": 1, "n": 1}])
    page = write(run)
    text = words(page)
    for told in (
        "FID of the average 9.25 n = 100, at 6,400",
        "FID 12.35 n = 256, at 6,400",
        "n = 100 pictures at each checkpoint.",
        "n = 256 pictures at each checkpoint.",
        "scores_ema.jsonl line 3 lacks a number for one of samples, n",
    ):
        assert told in text, told
    assert "Scores over samples: FID of the average (lower is better), CLIP score of" in page


def test_full_run(tmp_path):
    page = write(write_full(tmp_path / "ocean", optimizer={"warmup_steps": 7}))
    text = words(page)
    for expected in (
        "ocean – sd-perf",
        "6,400 of 6,400 samples · complete · begun 2026-05-01 10:00:00 UTC · 2 minutes of training",
        "of training · 2 CPU cores, no GPU 2 checkpoints",
        "2 checkpoints, the newest at 6,400 samples",
        "0.2929 → 0.0105 means of the first and last 10 logged steps",
        "samples/s 50.0 median",
        "FID 12.35 n = 256, at 6,400",
        "CLIP score 0.300 n = 256, at 6,400",
        "judge 87.5 % n = 256, at 6,400",
        "n = 256 pictures at each checkpoint",
        "At 6,400 samples: a red ball 0 a red ball 1",
        "On the way samples 3,200 6,400 a red ball 0 a red ball 1",
        "group_norm torch triton: needs a GPU, a red ball",
        "Passes the official compliance checker (open division, ruleset 5.0.0). passes, a red ball",
        "warmup_steps 7 default 1000",
        "git SHA abc123 versions torch 2.13.0",
        "resumed 2026-05-01T10:00:00+00:00 anna " + COMMAND,
    ):
        assert expected in text, expected
    for line in re.findall(r'<tr class="changed">.*?</tr>', page):
        assert any(key in line for key in ("max_samples", "global_batch_size", "warmup_steps")), (
            line
        )


def test_pictures_are_cut_from_the_newest_grid(full_page):
    pictures = [Image.open(io.BytesIO(png)) for png in data(full_page, "png")]
    # five prompts, then a row of each with the earlier picture and this one
    assert [picture.size for picture in pictures] == [(16, 16)] * (5 + 5 * 2)
    assert [picture.getpixel((8, 8)) for picture in pictures[:5]] == [
        (40 * i, 0, 0) for i in range(5)
    ]
    assert [picture.getpixel((8, 8))[0] for picture in pictures[5:]] == [
        40 * i for i in range(5) for _ in range(2)
    ]


def test_a_prompt_is_followed_through_grids_of_other_places(tmp_path):
    """Rows are prompts of the newest grid; a grid without any of them has no column."""
    run = write_bare(tmp_path / "run")
    write_grid(run, 64, ["a", "b", "e", "f"])
    write_grid(run, 128, ["x", "y", "v", "w"])
    write_grid(run, 192, ["b", "c", "d", "z"])
    page = write(run)
    table = re.search(r'<table class="through">.*?</table>', page, re.S)[0]
    assert words(table).split() == ["samples", "64", "192", "b"]
    colours = [Image.open(io.BytesIO(png)).getpixel((8, 8))[0] for png in data(table, "png")]
    assert colours == [40, 0]


def test_grids_without_a_prompt_in_common_are_shown_as_they_are(tmp_path):
    run = write_bare(tmp_path / "run")
    write_grid(run, 64, ["a", "b"])
    write_grid(run, 128, ["x", "y"])
    assert "On the way 64 samples" in words(write(run))


def test_axes_have_labels_and_units(full_page):
    charts = b"".join(data(full_page, "svg+xml")).decode()
    for label in (
        "loss (mean squared error of v)",
        "FID (lower is better)",
        "CLIP score (higher is better)",
        "judge (% of pictures right)",
        "throughput (samples/s)",
        "wait for data (% of time)",
        "learning rate",
    ):
        assert charts.count(f">{label}</text>") == 2, label  # wide and narrow
    assert charts.count(">samples seen</text>") == 2 * 7


def test_bare_run_says_what_is_absent(tmp_path):
    page = write(write_bare(tmp_path / "run"))
    text = words(page)
    for expected in (
        "2,560 of 6,400 samples · not complete: stopped, or still running",
        "No checkpoint.",
        "No checkpoint of this run has been evaluated (scores.jsonl).",
        "No pictures were drawn (samples/).",
        "No choice of kernels is recorded (kernels.json).",
        "No MLPerf log of this run has been checked (mlperf_verdict.json).",
    ):
        assert expected in text, expected
    assert "FID" not in text and len(data(page, "svg+xml")) == 4  # loss and speed, wide and narrow


def test_manifest_alone(tmp_path):
    run = write_bare(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    assert "No step is logged yet (metrics.jsonl)." in words(write(run))


def test_nothing_read_becomes_markup(tmp_path):
    run = write_full(
        tmp_path / "a<b>&c",
        prompt=HOSTILE,
        run={"note": HOSTILE},
        data={"path": HOSTILE, HOSTILE: HOSTILE},
    )
    manifest = json.loads((run / "run_manifest.json").read_text())
    manifest |= {"git_sha": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    manifest["machine"] = {"platform": HOSTILE, "cpus": HOSTILE, "gpus": []}
    manifest["starts"].append({"time": HOSTILE, "host": HOSTILE, "command": HOSTILE})
    manifest["config"][HOSTILE] = {"key": HOSTILE}
    (run / "run_manifest.json").write_text(json.dumps(manifest))
    page = write(run)
    assert "<script" not in page and "<img src=http" not in page and "<b>" not in page
    assert words(page).count(HOSTILE) >= 15
    assert_one_file(page)


def assert_one_file(page: str) -> None:
    for text in (page, *(svg.decode() for svg in data(page, "svg+xml"))):
        assert "<script" not in text and "@import" not in text and "<link" not in text
        references = re.findall(r"""<[^>]*?\b(?:src|href|srcset)\s*=\s*["']([^"']*)""", text)
        assert all(reference.startswith(("data:image/", "#")) for reference in references)
        assert all(
            reference.startswith(("data:image/", "#"))
            for reference in re.findall(r"url\(([^)]*)\)", text)
        )


def test_one_file_that_is_the_same_each_time(full_run, full_page, tmp_path):
    assert_one_file(full_page)
    shutil.copytree(full_run, tmp_path / "elsewhere" / "run")
    assert write(tmp_path / "elsewhere" / "run") == full_page


def test_scores_of_different_n_are_not_compared(tmp_path):
    run = write_bare(tmp_path / "run")
    scores = [{"samples": 640 * i, "fid": 9.0, "n": 256 if i < 3 else 30000} for i in (1, 2, 3)]
    write_lines(run / "scores.jsonl", scores)
    text = words(write(run))
    assert "n differs: 256 pictures at 2 checkpoints, then 30,000 pictures at 1 checkpoint." in text
    scores_alone = text.partition("Configuration")[0]  # whose keys name both
    assert "judge" not in scores_alone and "CLIP" not in scores_alone


def test_later_evaluation_of_a_position_supersedes(tmp_path):
    run = write_bare(tmp_path / "run")
    write_lines(
        run / "scores.jsonl", [{"samples": 640, "fid": fid, "n": 256} for fid in (9.0, 8.0)]
    )
    assert [line["fid"] for line in read_run(run).scores] == [8.0]


def test_grid_without_prompts_is_shown_whole(tmp_path):
    run = write_bare(tmp_path / "run")
    write_grid(run, 640, None)
    page = write(run)
    assert "No prompts beside this grid" in words(page)
    assert Image.open(io.BytesIO(data(page, "png")[0])).size == (48, 32)


def test_torn_last_line_is_left_out(tmp_path):
    run = write_bare(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"samples": 99999, "lo')
    text = words(write(run))
    assert "2,560 of 6,400" in text and "The last line of metrics.jsonl is torn" in text


def test_manifest_of_another_version(tmp_path):
    run = write_bare(tmp_path / "run", training={"max_samples": "many"})
    manifest = json.loads((run / "run_manifest.json").read_text())
    manifest["config"] |= {"run": "runs/old", "kernels": {"old_op": "auto"}}
    del manifest["versions"], manifest["machine"], manifest["git_sha"]
    (run / "run_manifest.json").write_text(json.dumps({**manifest, "starts": []}))
    text = words(write(run))
    assert "2,560 samples · not complete" in text and "begun at an unknown time" in text
    assert "old_op auto unknown to this version" in text and "not from a git checkout" in text


def test_matplotlib_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'sd-perf\[report\]'"):
        write_report(write_bare(tmp_path / "run"))


@pytest.mark.parametrize("count", [1, 2, 5, 3000])
def test_running_median(count):
    values = np.random.default_rng(0).normal(size=count)
    indices, medians = running_median(values)
    assert indices[0] == 0 and indices[-1] == count - 1 and len(indices) <= 600
    assert len(medians) == len(indices) and np.isfinite(medians).all()
    if count == 3000:
        middle = np.flatnonzero(indices > 100)[0]
        window = values[indices[middle] - 75 : indices[middle] + 76]
        assert medians[middle] == np.median(window) and abs(medians[200:]).max() < 0.5


def command(capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    return exit.value.code or 0, *capsys.readouterr()


def test_command(tmp_path, capsys):
    run = write_bare(tmp_path / "run")
    code, output, _ = command(capsys, "report", run)
    assert code == 0 and output.strip() == str(run / "report.html")


def test_command_on_no_run(tmp_path, capsys):
    code, _, errors = command(capsys, "report", tmp_path)
    assert (
        code == 2
        and errors
        == f"sd-perf: {tmp_path}: is no run folder (no run_manifest.json); give one that "
        f"sd-perf train has made\n"
    )
