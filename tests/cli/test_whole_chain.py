"""From a table of addresses to scores, a command per step as docs/datasets.md has them.

A local server plays the internet, with real photographs. Pictures are of 64x64 pixels, so that it
takes a minute.
"""

from __future__ import annotations

import functools
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from sd_perf.data.laion.download import default_environment, make_environment
from sd_perf.errors import UserError
from sd_perf.evaluation.fid import Gaussian

pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
pytest.importorskip("onnxruntime", reason="needs onnxruntime")

ROOT = Path(__file__).parents[2]
TINY = ROOT / "assets" / "tiny"
UNLICENSED, GONE = 10, 3
"""photographs without a known licence, and addresses that lead nowhere"""
PROMPTS = 16


class Photographs(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; /gone/... is not there."""

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def internet(real_data: Path) -> Iterator[str]:
    """The address of a server of the photographs."""
    handler = functools.partial(Photographs, directory=real_data / "coco_ccby" / "images")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def img2dataset() -> Path:
    """Its environment, which is made where it is not there yet."""
    try:
        make_environment(default_environment(), print)
    except UserError as error:
        pytest.skip(str(error))
    return default_environment()


@pytest.fixture
def photographs(real_data: Path) -> list[dict]:
    lines = (real_data / "coco_ccby" / "captions.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def write_metadata(folder: Path, photographs: list[dict], address: str) -> None:
    """LAION's table of the photographs and of addresses that lead nowhere."""
    folder.mkdir()
    names = [each["file"] for each in photographs] + [f"gone/{n}.jpg" for n in range(GONE)]
    texts = [each["captions"][0] for each in photographs] + [None] * GONE
    licences = ["?" if n < UNLICENSED else "cc-by" for n in range(len(names))]
    columns = {
        "SAMPLE_ID": list(range(len(names))),
        "URL": [f"{address}/{name}" for name in names],
        "TEXT": texts,
        "LICENSE": licences,
        "NSFW": ["UNLIKELY"] * len(names),
        "similarity": [0.3] * len(names),
        "WIDTH": [640] * len(names),
        "HEIGHT": [480] * len(names),
    }
    parquet.write_table(pa.table(columns), folder / "part-00000.snappy.parquet")


def write_coco(folder: Path, photographs: list[dict], images: Path) -> None:
    """The photographs under COCO's names, with their captions in COCO's format."""
    (folder / "val2014").mkdir(parents=True)
    annotations = []
    for each in photographs:
        name = f"COCO_val2014_{each['coco_id']:012}.jpg"
        (folder / "val2014" / name).symlink_to(images / each["file"])
        for caption in each["captions"]:
            place = {"image_id": each["coco_id"], "id": len(annotations)}
            annotations.append({**place, "caption": caption})
    (folder / "captions.json").write_text(json.dumps({"annotations": annotations}))


def write_preset(folder: Path, real_data: Path) -> Path:
    """The tiny world's run, on 64x64 photographs: 200 samples, one checkpoint."""
    clip = {"model": str(TINY / "clip.json"), "weights": str(TINY / "clip.safetensors")}
    tree = {
        "extends": str(ROOT / "configs" / "smoke.yaml"),
        "run": {"dir": str(folder / "run")},
        "model": {"implementation": "plain"},
        "data": {"path": str(folder / "moments"), "context": "open_clip"},
        "text_encoder": clip,
        "training": {"max_samples": 200, "global_batch_size": 8, "cpu_threads": 1},
        "checkpoint": {"every_samples": 200},
        "sampling": {"steps": 3},
        "evaluation": {
            "prompts": str(folder / "val.tsv"),
            "num_prompts": PROMPTS,
            "autoencoder": str(real_data / "vaelight" / "VAEpreview.onnx"),
            "features": str(TINY / "features.safetensors"),
            "statistics": str(folder / "statistics.npz"),
            "clip_model": clip["model"],
            "clip_weights": clip["weights"],
            "judge": False,
        },
    }
    path = folder / "chain.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.slow
def test_from_addresses_to_scores(sd_perf, tmp_path, real_data, internet, img2dataset, photographs):
    def run(*words: object) -> str:
        code, output, errors = sd_perf(*words)
        assert code == 0, errors
        return output

    write_metadata(tmp_path / "metadata", photographs, internet)
    preset = write_preset(tmp_path, real_data)
    encoder = real_data / "vaelight" / "VAEencoder.onnx"
    good = len(photographs) - UNLICENSED
    folders = {name: tmp_path / name for name in ("filtered", "images", "moments", "val_64")}

    output = run("data", "filter-metadata", "-i", tmp_path / "metadata", "-o", folders["filtered"])
    assert f"{good + GONE} of {len(photographs) + GONE} rows" in output
    options = ("-j", 1, "-t", 16, "--environment", img2dataset)
    output = run(
        "data", "download-images", "-m", folders["filtered"], "-o", folders["images"], *options
    )
    assert f"{good} of {good + GONE} pictures" in output and "404" in output
    options = ("--config", preset, "--checkpoint", encoder, "--image-range", "correct")
    output = run("data", "convert", "-i", folders["images"], "-o", folders["moments"], *options)
    assert output.startswith(f"{good} samples in 1 shards, 0 pictures left out")
    for name in ("images", "moments"):
        verdict = json.loads(run("data", "verify", folders[name], "--config", preset, "--json"))
        assert verdict["samples"] == good and verdict["faults"] == []
    run("data", "show", folders["moments"], "--config", preset, "--output", tmp_path / "page.html")
    run("train", "--config", preset)

    write_coco(tmp_path / "coco", photographs, real_data / "coco_ccby" / "images")
    run(
        *("data", "split-coco", "-i", tmp_path / "coco" / "val2014"),
        *("-c", tmp_path / "coco" / "captions.json", "-o", folders["val_64"]),
        *("-t", tmp_path / "val.tsv", "-n", 100, "--size", 64),
    )
    statistics = ("-d", folders["val_64"], "-o", tmp_path / "statistics.npz")
    run("data", "fid-statistics", *statistics, "--features", TINY / "features.safetensors")
    assert len(Gaussian.load_npz(tmp_path / "statistics.npz").mean) == 64
    assert "200" in run("evaluate", tmp_path / "run")
    [line] = (tmp_path / "run" / "scores.jsonl").read_text().splitlines()
    assert json.loads(line)["samples"] == 200 and json.loads(line)["n"] == PROMPTS
