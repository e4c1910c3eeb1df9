"""`sd-perf train --explain`: ten lines, true of the run, and nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.small_run import train_here


def lines_of(output: str) -> dict[str, str]:
    lines = output.splitlines()
    assert len(lines) == 10
    return {name: words for name, _, words in (line.partition(" ") for line in lines)}


def test_ten_lines(preset: Path, tmp_path: Path, sd_perf) -> None:
    sinks = ("--logging.sinks", "csv", "wandb", "--logging.prometheus", tmp_path / "x.prom")
    options = ("--run.dir", tmp_path / "run", *sinks, "--mlperf.division", "open")
    code, output, _ = sd_perf("train", "--config", preset, "--explain", *options)
    assert code == 0
    told = lines_of(output)
    for name, words in {
        "run": f"a new one in {tmp_path / 'run'}",
        "network": "plain in fp32, predicts v, from random weights of seed 0",
        "data": "synthetic: drawn from the seed",
        "steps": "50 of 4 samples (1 x 1 micro-batches of 4), 200 samples in all",
        "rate": "0.0004 after 10 steps, then constant",
        "machine": "cpu, 1 rank",
        "saves": "a checkpoint every 40 samples: 5, of which 5 are kept",
        "writes": "result_0.txt (MLPerf log, open division), sinks.json",
        "sends": f"CSV files, W&B (project sd-perf, online), Prometheus ({tmp_path / 'x.prom'})",
        "then": f"watch {tmp_path / 'run'} meanwhile",
    }.items():
        assert words in told[name], name
    assert not (tmp_path / "run").exists()


def test_a_run_that_is_there(preset: Path, tmp_path: Path, sd_perf) -> None:
    run = tmp_path / "run"
    train_here(preset, run, "--training.max-samples", "40")
    explain = ("train", "--config", preset, "--run.dir", run, "--explain")
    refused = lines_of(sd_perf(*explain)[1])["run"]
    assert "would be refused" in refused and "--resume" in refused
    resumed = lines_of(sd_perf(*explain, "--resume")[1])["run"]
    assert f"continues the one in {run} from 40 samples" in resumed


def test_shards_are_counted(tmp_path: Path, sd_perf) -> None:
    preset = tmp_path / "p.yaml"
    preset.write_text(f"data: {{path: {tmp_path}/shards, context: precomputed}}\n")
    explain = ("train", "--config", preset, "--explain")
    assert "is not a folder; data.path must name" in lines_of(sd_perf(*explain)[1])["data"]
    (tmp_path / "shards").mkdir()
    for number in range(3):
        (tmp_path / "shards" / f"{number:05d}.tar").write_bytes(bytes(10**6))
    told = lines_of(sd_perf(*explain)[1])["data"]
    assert "3 moments shards in" in told and "0.003 GB; text: precomputed" in told


@pytest.mark.parametrize("ranks", [3, 0])
def test_a_batch_that_does_not_divide(ranks: int, preset: Path, refused) -> None:
    sentence = refused("train", "--config", preset, "--explain", "--ranks", ranks)
    assert ("global_batch_size" if ranks else "--ranks") in sentence
