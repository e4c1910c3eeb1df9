"""Evaluation of a run of the tiny world from end to end: scores, grid, MLPerf log, report; and bad input."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from sd_perf.cli import main
from sd_perf.config import Config
from sd_perf.data.prepare.scenes import write_scenes
from sd_perf.distributed.world import start_world
from sd_perf.errors import CheckpointError, ConfigError, DataError
from sd_perf.evaluation.evaluate import evaluate_run, judge_scores, read_scores, write_grid, write_statistics
from sd_perf.evaluation.prompts import read_prompts
from sd_perf.mlperf.check import check
from sd_perf.presets import load_preset
from sd_perf.training.launch import launch

ROOT = Path(__file__).parents[2]
PROMPTS = 12


def small_run(folder: Path) -> Config:
    """The smoke preset with a smaller UNet, random latents, 64 samples and few prompts, inside `folder`."""
    config = load_preset(ROOT / "configs" / "smoke.yaml")
    asset = {
        key: str(ROOT / getattr(config.evaluation, key))
        for key in ("autoencoder", "features", "clip_model", "clip_weights")
    }
    replace = dataclasses.replace
    return replace(
        config,
        run=replace(config.run, dir=str(folder / "run")),
        model=replace(config.model, model_channels=32),
        data=replace(config.data, format="synthetic"),
        text_encoder=replace(config.text_encoder, model=asset["clip_model"], weights=asset["clip_weights"]),
        training=replace(config.training, global_batch_size=16, max_samples=64, device="cpu", cpu_threads=1),
        checkpoint=replace(config.checkpoint, every_samples=32),
        logging=replace(config.logging, every_steps=1),
        sampling=replace(config.sampling, steps=2),
        evaluation=replace(
            config.evaluation,
            prompts=str(folder / "prompts" / "captions.jsonl"),
            num_prompts=PROMPTS,
            statistics=str(folder / "statistics.npz"),
            **asset,
        ),
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """A trained small run with prompts and statistics, evaluated once."""
    config = small_run(tmp_path_factory.mktemp("evaluated"))
    write_scenes(Path(config.evaluation.prompts).parent, 16, seed=3)
    assert write_statistics(Path(config.evaluation.prompts).parent, config) == 16
    assert launch(config, start_world("cpu"), resume=False, fresh=False, console=Console(quiet=True)) is None
    evaluate_run(Path(config.run.dir), config, torch.device("cpu"), lambda line: None)
    return config


def test_every_checkpoint_has_a_line_with_n(config):
    lines = read_scores(Path(config.run.dir))
    assert [line["samples"] for line in lines] == [32, 64]
    assert all(line.keys() == {"samples", "fid", "clip", "judge", "judge_shuffled", "n"} for line in lines)
    assert all(line["n"] == PROMPTS and line["fid"] > 0 and -1 <= line["clip"] <= 1 for line in lines)


def test_grid_and_its_captions(config):
    folder = Path(config.run.dir) / "samples"
    grid = json.loads((folder / "samples_0000000064.json").read_text())
    assert grid == {"prompts": read_prompts(Path(config.evaluation.prompts), 8), "columns": 8}
    assert Image.open(folder / "samples_0000000064.png").size == (8 * 64, 64)


def test_mlperf_log_passes_the_open_division(config):
    verdict = check(Path(config.run.dir) / "result_0.txt", "open")
    assert verdict.passed, str(verdict)
    assert verdict.status == "aborted"  # random latents converge to nothing


def test_second_evaluation_adds_nothing(config):
    run = Path(config.run.dir)
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    evaluate_run(run, config, torch.device("cpu"), lambda line: pytest.fail("scored again"))
    changed = [path.name for path, data in before.items() if path.read_bytes() != data]
    assert changed in ([], ["mlperf_verdict.json"])


def test_commands(config, capsys):
    for command in (["evaluate"], ["mlperf", "check"], ["report"]):
        with pytest.raises(SystemExit) as left:
            main([*command, config.run.dir])
        assert left.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "passes the official compliance checker" in printed
    page = (Path(config.run.dir) / "report.html").read_text()
    assert "FID" in page and "passes the official compliance checker" in page


def test_grid_of_pictures_keeps_their_places(tmp_path):
    pictures = torch.arange(10).view(10, 1, 1, 1).expand(10, 3, 4, 4) / 255
    path = write_grid(pictures, [str(i) for i in range(10)], tmp_path, 5)
    pixels = np.asarray(Image.open(path).convert("L"))
    assert pixels.shape == (4, 32) and pixels[0, ::4].tolist() == list(range(8))


def test_judge_leaves_out_pairs_of_equal_captions(tmp_path):
    grey = torch.full((3, 3, 64, 64), 0.5)
    assert judge_scores(grey, ["a red square left of a blue circle", "x", "x"])["judge"] == 0


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.tsv", 'image_id\tid\tcaption\n1\t2\ta "dog"\n3\t4\ta cat\n', ['a "dog"', "a cat"]),
        ("p.jsonl", '{"file": "a", "captions": ["x", "y"]}\n{"file": "b", "caption": "z"}\n', ["x", "z"]),
    ],
)
def test_prompts(name, text, expected, tmp_path):
    (tmp_path / name).write_text(text)
    assert read_prompts(tmp_path / name, 2) == expected
    with pytest.raises(DataError, match=r"holds 2 captions, and evaluation\.num_prompts is 3"):
        read_prompts(tmp_path / name, 3)


@pytest.mark.parametrize(("name", "text"), [("p.tsv", "a\tb\n1\t2\n"), ("p.jsonl", "{"), ("p.jsonl", '{"a": 1}')])
def test_bad_prompts(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=r"not a \.tsv with a column"):
        read_prompts(tmp_path / name, 1)
    with pytest.raises(DataError, match="no such file"):
        read_prompts(tmp_path / "absent.tsv", 1)


def test_what_scores_need_must_be_named(config):
    bare = dataclasses.replace(config, evaluation=dataclasses.replace(config.evaluation, statistics=""))
    with pytest.raises(ConfigError, match=r"evaluation\.statistics: '' cannot be used"):
        evaluate_run(Path(config.run.dir), bare, torch.device("cpu"), lambda line: None)


def test_nothing_to_evaluate(config, tmp_path):
    with pytest.raises(CheckpointError, match="holds no complete checkpoint to evaluate"):
        evaluate_run(tmp_path, config, torch.device("cpu"), lambda line: None)
