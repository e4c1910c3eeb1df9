"""Evaluation of a run of the tiny world: scores, grid, MLPerf log, report, and bad input."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sd_perf.cli import main
from sd_perf.config import Config
from sd_perf.console import TextConsole
from sd_perf.data.prepare.scenes import write_scene_shards, write_scenes
from sd_perf.distributed.world import start_world
from sd_perf.errors import CheckpointError, ConfigError, DataError
from sd_perf.evaluation import evaluate
from sd_perf.evaluation.evaluate import evaluate_run, write_grid, write_statistics
from sd_perf.evaluation.evaluator import Evaluator
from sd_perf.evaluation.fid import FeatureStatistics, Gaussian, frechet_distance
from sd_perf.evaluation.judge import judge
from sd_perf.evaluation.measured import GRID, Measured
from sd_perf.evaluation.prompts import read_prompts
from sd_perf.mlperf.compliance import check_log
from sd_perf.presets import load_preset
from sd_perf.runs.scores import read_scores
from sd_perf.training.launch import launch

ROOT = Path(__file__).parents[2]
PROMPTS = 12


def small_run(folder: Path) -> Config:
    """The smoke preset inside `folder`, made small.

    It has a smaller UNet, synthetic latents, 64 samples and few prompts.
    """
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
        mlperf=replace(config.mlperf, waive=("parity",)),
        data=replace(config.data, format="synthetic"),
        text_encoder=replace(
            config.text_encoder, model=asset["clip_model"], weights=asset["clip_weights"]
        ),
        training=replace(
            config.training,
            global_batch_size=16,
            max_samples=64,
            device="cpu",
            cpu_threads=1,
            ema_decay=0.9,
        ),
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
    assert (
        launch(
            config, start_world("cpu"), resume=False, fresh=False, console=TextConsole(quiet=True)
        )
        is None
    )
    evaluate_run(Path(config.run.dir), config, start_world("cpu"), lambda line: None)
    return config


def test_statistics_of_raw_shards_are_those_of_the_folder(config, tmp_path):
    write_scene_shards(tmp_path / "shards", 16, seed=3)
    paths = [tmp_path / "folder.npz", tmp_path / "shards.npz"]
    for images, path in zip(
        (Path(config.evaluation.prompts).parent, tmp_path / "shards"), paths, strict=True
    ):
        options = dataclasses.replace(config.evaluation, statistics=str(path), batch_size=5)
        assert write_statistics(images, dataclasses.replace(config, evaluation=options)) == 16
    folder, shards = map(Gaussian.load_npz, paths)
    assert torch.equal(folder.mean, shards.mean) and torch.equal(
        folder.covariance, shards.covariance
    )


def test_statistics_are_of_whole_pictures_without_their_aspect(config, tmp_path):
    means = []
    for name, size in (("wide", (100, 70)), ("squashed", (64, 64))):
        folder, pixels = tmp_path / name, np.random.default_rng(0).integers(0, 256, (3, 70, 100, 3))
        folder.mkdir()
        for number, picture in enumerate(pixels.astype(np.uint8)):
            image = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
            image.save(folder / f"{number}.png")
        lines = [f'{{"file": "{number}.png", "caption": "a"}}\n' for number in range(len(pixels))]
        (folder / "captions.jsonl").write_text("".join(lines))
        options = dataclasses.replace(config.evaluation, statistics=str(tmp_path / f"{name}.npz"))
        write_statistics(folder, dataclasses.replace(config, evaluation=options))
        means.append(Gaussian.load_npz(tmp_path / f"{name}.npz").mean)
    assert torch.equal(*means)


def without_times(line: dict) -> dict:
    return {key: value for key, value in line.items() if not key.endswith("_ms")}


def test_every_checkpoint_has_a_line_with_n(config):
    lines = read_scores(Path(config.run.dir))
    assert [line["samples"] for line in lines] == [32, 64]
    scores, others = {"fid", "clip", "judge", "judge_shuffled"}, {"precision", "samples", "n"}
    assert all(line.keys() == scores | others | {"start_ms", "stop_ms"} for line in lines)
    assert {line["precision"] for line in lines} == {"fp32"}
    assert all(
        line["n"] == PROMPTS and line["fid"] > 0 and -1 <= line["clip"] <= 1 for line in lines
    )


def test_grid_and_its_captions(config):
    folder = Path(config.run.dir) / "samples"
    grid = json.loads((folder / "samples_0000000064.json").read_text())
    assert grid == {"prompts": read_prompts(Path(config.evaluation.prompts), PROMPTS), "columns": 8}
    pictures = Image.open(folder / "samples_0000000064.png")
    assert pictures.size == (8 * 64, 2 * 64)
    gap = np.asarray(pictures)[64:, (PROMPTS - 8) * 64 :]
    assert (gap == 255).all()  # white where there is no picture


def test_mlperf_log_passes_the_open_division(config):
    verdict = check_log(Path(config.run.dir) / "result_0.txt", "open")
    assert verdict.passed, str(verdict)
    assert verdict.status == "aborted"  # random latents converge to nothing


def test_second_evaluation_loads_and_adds_nothing(config, monkeypatch):
    monkeypatch.setattr(evaluate, "Evaluator", lambda *_: pytest.fail("loaded networks"))
    run = Path(config.run.dir)
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    evaluate_run(run, config, start_world("cpu"), lambda line: pytest.fail("scored again"))
    changed = [path.name for path, data in before.items() if path.read_bytes() != data]
    assert changed in ([], ["mlperf_verdict.json"])


def test_a_line_that_a_kill_cut_is_scored_again_and_the_rest_stays(config, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(config.run.dir, run)
    first, second = (run / "scores.jsonl").read_text().splitlines(keepends=True)
    (run / "scores.jsonl").write_text(first + second[:20])
    told = []
    evaluate_run(run, config, start_world("cpu"), told.append)
    assert len(told) == 1 and told[0].startswith("64 samples: FID")
    again = json.loads((run / "scores.jsonl").read_text().splitlines()[1])
    assert without_times(again) == without_times(json.loads(second))
    assert (run / "scores.jsonl").read_text().startswith(first)


def test_damaged_scores(config, tmp_path, capsys):
    """Evaluation, which writes to the file, refuses it; the report shows the line as damaged."""
    run = tmp_path / "run"
    shutil.copytree(config.run.dir, run)
    (run / "scores.jsonl").write_text('{"samples": 32}\n')
    words = "line 1 lacks a number for one of samples,"
    with pytest.raises(SystemExit) as left:
        main(["evaluate", str(run)])
    assert left.value.code == 2
    assert f"{run / 'scores.jsonl'}: {words}" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["report", str(run)])
    assert left.value.code == 0
    assert f"scores.jsonl {words}" in (run / "report.html").read_text()


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
    assert pixels.shape == (8, 32) and pixels[0, ::4].tolist() == list(range(8))
    assert pixels[4, ::4].tolist() == [8, 9, *[255] * 6]
    shown = json.loads(path.with_suffix(".json").read_text())
    assert shown == {"prompts": [str(i) for i in range(10)], "columns": 8}


@pytest.fixture(scope="module")
def evaluator(config) -> Evaluator:
    """An evaluator of 100 prompts, two thirds of which repeat the prompt before."""
    prompts = Path(config.evaluation.prompts).parent.parent / "more"
    write_scenes(prompts, 100, seed=5)
    options = {"prompts": str(prompts / "captions.jsonl"), "num_prompts": 100, "batch_size": 13}
    changed = dataclasses.replace(
        config, evaluation=dataclasses.replace(config.evaluation, **options)
    )
    made = Evaluator(changed, torch.device("cpu"))
    made.prompts = [made.prompts[i if i % 3 == 2 else i - 1] for i in range(100)]
    return made


def scenes(evaluator: Evaluator) -> torch.Tensor:
    """(100, 3, 64, 64) in [0, 1]"""
    folder = Path(evaluator.config.evaluation.prompts).parent
    images = [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255


def test_streamed_scores_are_those_of_all_pictures_at_once(evaluator):
    pictures, prompts, batch_size = scenes(evaluator), evaluator.prompts, 13
    statistics, cosines = FeatureStatistics(64), []
    for start in range(0, 100, batch_size):
        batch = pictures[start : start + batch_size]
        with torch.no_grad():
            statistics.update(evaluator.features(batch))
        cosines.append(evaluator.clip.similarities(batch, prompts[start : start + batch_size]))
    images = pictures.permute(0, 2, 3, 1).numpy()
    others = [
        (image, other)
        for image, caption, other in zip(images, prompts, prompts[1:] + prompts[:1], strict=True)
        if other != caption
    ]
    assert len(others) < 100
    measured = measure(evaluator, pictures.split(batch_size))
    line = evaluator.scores(measured)
    assert line == {
        "fid": frechet_distance(statistics.gaussian(), evaluator.real),
        "clip": torch.cat(cosines).double().mean().item(),
        "judge": np.mean([judge(*pair) for pair in zip(images, prompts, strict=True)]),
        "judge_shuffled": np.mean([judge(*pair) for pair in others]),
        "n": 100,
    }
    assert 0 < line["judge"] < line["judge_shuffled"] < 1
    assert torch.equal(measured.grid, (255 * pictures[:GRID]).round().byte())
    at_once = evaluator.scores(measure(evaluator, [pictures]))
    assert at_once == pytest.approx(line, rel=1e-5)


def measure(evaluator: Evaluator, batches: Iterable[torch.Tensor]) -> Measured:
    """Of the pictures of all prompts."""
    starts = accumulate((len(batch) for batch in batches), initial=0)
    return Measured.joined(map(evaluator.measure, starts, batches))


def test_no_scores_of_nan(evaluator):
    weights = {**evaluator.unet.state_dict()}
    weights["out.2.bias"] = torch.full_like(weights["out.2.bias"], float("nan"))
    with pytest.raises(CheckpointError, match=r"^runs/x/samples_4: \d+ of \d+ latents .* NaN"):
        next(evaluator.draw(weights, 0, evaluator.starts(), source="runs/x/samples_4"))


def test_feature_net_takes_pictures_of_one_size(config):
    data = dataclasses.replace(config.data, latent_size=2 * config.data.latent_size)
    with pytest.raises(DataError, match=r"takes pictures of 64x64 .*latent_size 16 gives 128x128"):
        Evaluator(dataclasses.replace(config, data=data), torch.device("cpu"))


def test_statistics_of_another_network_are_told_before_anything_is_drawn(config, tmp_path):
    Gaussian(torch.zeros(3), torch.eye(3)).save_npz(tmp_path / "other.npz")
    options = dataclasses.replace(config.evaluation, statistics=str(tmp_path / "other.npz"))
    with pytest.raises(
        DataError, match=r"other\.npz: holds statistics of 3 features, and .* gives 64"
    ):
        Evaluator(dataclasses.replace(config, evaluation=options), torch.device("cpu"))


def test_what_scores_need_must_be_named(config):
    bare = dataclasses.replace(
        config, evaluation=dataclasses.replace(config.evaluation, statistics="")
    )
    with pytest.raises(ConfigError, match=r"evaluation\.statistics: '' cannot be used"):
        Evaluator(bare, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"evaluation\.statistics: '' cannot be used"):
        write_statistics(Path(config.evaluation.prompts).parent, bare)


def test_nothing_to_evaluate(config, tmp_path):
    with pytest.raises(CheckpointError, match="holds no complete checkpoint to evaluate"):
        evaluate_run(tmp_path, config, start_world("cpu"), lambda line: None)
