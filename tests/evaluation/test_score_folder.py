"""Scores of any folder: those of an evaluation of the same pictures, and what cannot be scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sd_perf.data.prepare.scenes import write_scenes
from sd_perf.errors import DataError
from sd_perf.evaluation.clip_score import ClipScorer
from sd_perf.evaluation.evaluator import read_features
from sd_perf.evaluation.fid import FeatureStatistics, Gaussian, frechet_distance
from sd_perf.evaluation.folder_statistics import find_pictures, read_picture
from sd_perf.evaluation.score_folder import Scoring, score_folder

ASSETS = Path(__file__).parents[2] / "assets/tiny"
FEATURES, CLIP = ASSETS / "features.safetensors", ASSETS / "clip.json"
WEIGHTS = ASSETS / "clip.safetensors"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 scenes of the tiny world: more than a batch."""
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 70, seed=5)
    return folder


def captions_of(folder: Path) -> dict[str, str]:
    lines = map(json.loads, (folder / "captions.jsonl").read_text().splitlines())
    return {line["file"]: line["caption"] for line in lines}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Other scenes, and the file of their statistics."""
    folder = tmp_path_factory.mktemp("real")
    write_scenes(folder, 66, seed=7)
    statistics = FeatureStatistics(64)
    network = read_features(FEATURES, CPU)
    pictures = torch.stack([read_picture(path) for path in find_pictures(folder)])
    with torch.no_grad():
        for batch in pictures.split(50):
            statistics.update(network(batch))
    path = folder.with_suffix(".npz")
    statistics.gaussian().save_npz(path)
    return folder, path


def test_scores_by_hand(folder, real):
    paths = find_pictures(folder)
    pictures = torch.stack([read_picture(path) for path in paths])
    statistics = FeatureStatistics(64)
    with torch.no_grad():
        statistics.update(read_features(FEATURES, CPU)(pictures))
    fid = frechet_distance(statistics.gaussian(), Gaussian.load_npz(real[1]))
    captions = captions_of(folder)
    scorer = ClipScorer(str(CLIP), WEIGHTS)
    clip = scorer.similarities(pictures, [captions[path.name] for path in paths]).double().mean()
    done: list[tuple[int, int]] = []
    clip_options = {"clip_model": str(CLIP), "clip_weights": WEIGHTS}
    for statistics_of in real[::-1]:
        scoring = Scoring(FEATURES, statistics_of, folder / "captions.jsonl", **clip_options)
        scores = score_folder(folder, scoring, CPU, lambda *of: done.append(of))
        assert scores.n == 70
        assert scores.fid == pytest.approx(fid, rel=1e-6)
        assert scores.clip == pytest.approx(clip.item(), rel=1e-5)
    assert done == [(50, 70), (70, 70)] * 2


def test_captions_of_a_table_are_in_the_order_of_names(folder, tmp_path):
    captions = captions_of(folder)
    names = [path.name for path in find_pictures(folder)]
    rows = [f"{number}\t{captions[name]}" for number, name in enumerate(names)]
    table = tmp_path / "prompts.tsv"
    table.write_text("\n".join(["id\tcaption", *rows]) + "\n")
    clip_options = {"clip_model": str(CLIP), "clip_weights": WEIGHTS}
    by_name, by_order = (
        score_folder(folder, Scoring(captions=file, **clip_options), CPU)
        for file in (folder / "captions.jsonl", table)
    )
    assert by_name.fid is None and by_name.clip == pytest.approx(by_order.clip, rel=1e-9)
    table.write_text("\n".join(["id\tcaption", *rows[:-1]]) + "\n")
    with pytest.raises(DataError, match="holds 69 captions"):
        score_folder(folder, Scoring(captions=table, **clip_options), CPU)


def test_statistics_of_another_network(folder, tmp_path):
    Gaussian(torch.zeros(3), torch.eye(3)).save_npz(tmp_path / "other.npz")
    with pytest.raises(DataError, match=r"other\.npz: holds statistics of 3 features"):
        score_folder(folder, Scoring(FEATURES, tmp_path / "other.npz"), CPU)


def test_the_command(folder, real, sd_perf):
    options = ("--images", folder, "--statistics", real[1], "--features", FEATURES)
    code, output, _ = sd_perf("score", *options)
    assert code == 0 and output.startswith("FID ") and "(n = 70)" in output
    assert "fewer than 10,000 pictures is biased" in output
    code, output, _ = sd_perf("score", *options, "--json")
    assert json.loads(output).keys() == {"n", "fid", "clip"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "name what to score"),
        (("--statistics", "a.npz"), "--statistics needs --features, too"),
        (("--captions", "a.tsv"), "--captions needs --clip-weights, too"),
        (("--features", FEATURES, "--statistics", "a.npz"), "a.npz: no such file"),
        (("--workers", "0"), "--workers: 0 cannot be used"),
    ],
)
def test_what_is_not_scored(options, words, folder, refused):
    assert words in refused("score", "--images", folder, *options)
