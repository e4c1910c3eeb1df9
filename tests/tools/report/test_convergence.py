"""`sd-perf mlperf convergence` and the bands of the report."""

from __future__ import annotations

import base64
import re

import pytest

from sd_perf.errors import DataError
from sd_perf.tools.report.convergence import read_progress, write_convergence
from sd_perf.tools.report.write_report import write_report
from tests.tools.report.test_report import write_bare, write_lines

BENCHMARK = {
    "training": {"global_batch_size": 512, "max_samples": 5_120_000},
    "optimizer": {"base_learning_rate": 1.25e-7},
    "data": {"format": "moments"},
}
SCORES = [
    {"samples": 512_000, "fid": 240.0, "clip": 0.058, "n": 30_000},
    {"samples": 1_024_000, "fid": 260.0, "clip": 0.06, "n": 30_000},
]


def charts(page: str) -> list[str]:
    return [
        base64.b64decode(data).decode()
        for data in re.findall(r'src="data:image/svg\+xml;base64,([^"]+)', page)
    ]


def test_a_run_under_way(tmp_path, sd_perf):
    run = write_bare(tmp_path / "run", **BENCHMARK)
    code, out, _ = sd_perf("mlperf", "convergence", run)
    assert code == 0 and "run: No checkpoint is scored yet; the mean of" in out
    write_lines(run / "scores.jsonl", SCORES)
    code, out, _ = sd_perf("mlperf", "convergence", run)
    assert code == 0 and "Behind in FID and CLIP: at 1,024,000 samples FID is 260.0" in out
    page = (run / "convergence.html").read_text()
    assert "Behind in FID and CLIP" in page and "#e4e4e4" in charts(page)[0]
    page = write_report(run).read_text()
    assert "Grey: published runs of this batch size. Behind in FID" in page
    assert sum("#e4e4e4" in chart for chart in charts(page)) == 1  # no loss is known of 5 steps


def test_another_world_has_no_band(tmp_path, sd_perf):
    run = write_bare(tmp_path / "run", **BENCHMARK, model={"model_channels": 64})
    write_lines(run / "scores.jsonl", SCORES)
    code, out, _ = sd_perf("mlperf", "convergence", run)
    assert code == 0 and "its network is not the benchmark's (model.model_channels is 64" in out
    page = write_report(run).read_text()
    assert "published runs" not in page and not any("#e4e4e4" in c for c in charts(page))


def test_scores_of_few_pictures_are_not_compared(tmp_path):
    run = write_bare(tmp_path / "run", **BENCHMARK)
    write_lines(run / "scores.jsonl", [{**line, "n": 256} for line in SCORES])
    page = tmp_path / "page.html"
    write_convergence(read_progress([run]), page)
    text = page.read_text()
    assert "Scores are of 256 pictures" in text and "</script>" not in text


def test_bad_input(tmp_path, sd_perf):
    code, _, errors = sd_perf("mlperf", "convergence", tmp_path / "absent")
    assert code == 2 and "no such MLPerf log" in errors
    log = tmp_path / "result_0.txt"
    log.write_text(":::MLLOG {not json\n")
    with pytest.raises(DataError, match="tells no batch size, learning rate and eval_samples"):
        read_progress([log])


def test_published_logs(real_data, sd_perf, tmp_path):
    logs = [real_data / "mlperf_logs" / name for name in ("v3.1", "v4.0/GigaComputing")]
    page = tmp_path / "page.html"
    code, out, _ = sd_perf("mlperf", "convergence", *logs, "--output", page)
    assert code == 0 and out.count("Has converged") == 2 and page.is_file()
