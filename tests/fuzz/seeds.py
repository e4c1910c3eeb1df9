"""For each reader, bytes that it takes, as a start for mutations."""

from __future__ import annotations

import io
import json
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from sd_perf.data.encoded import new_layout
from sd_perf.data.shards import INDEX_NAME, ShardIndex
from sd_perf.evaluation.feature_net import FeatureNet, FeatureNetConfig
from sd_perf.evaluation.measured import Keeper, Measured


def write_indexed_shard(folder: Path) -> None:
    """A shard whose time is always the same, so that an index of it is taken at another place."""
    path = folder / "0.tar"
    path.write_bytes(SEEDS["shard"])
    os.utime(path, ns=(1, 1))


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _tar(**files: bytes) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for extension, content in files.items():
            info = tarfile.TarInfo(f"a.{extension.replace('_', '.')}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def _zip() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("val/a.jpg", b"some bytes")
        archive.writestr("val/b.jpg", b"b" * 100, zipfile.ZIP_DEFLATED)
    return stream.getvalue()


def _png() -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (9, 8), (200, 30, 90)).save(stream, format="png")
    return stream.getvalue()


def _photograph() -> bytes:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x011A] = 6, "a note", 72.0
    exif[0x8825] = {1: "N", 2: (1.0, 2.0, 3.0)}
    stream = io.BytesIO()
    Image.new("RGB", (9, 8), (200, 30, 90)).save(stream, format="jpeg", exif=exif)
    return stream.getvalue()


def _parquet() -> bytes:
    import pyarrow
    from pyarrow import parquet

    texts = {name: ["?", "a"] for name in ("SAMPLE_ID", "URL", "TEXT", "LICENSE", "NSFW")}
    numbers = {name: [1, 2] for name in ("similarity", "WIDTH", "HEIGHT")}
    stream = io.BytesIO()
    parquet.write_table(pyarrow.table({**texts, **numbers}), stream)
    return stream.getvalue()


def _mllog() -> bytes:
    at = {"samples_count": 512000}
    entries: list[tuple[str, object, dict]] = [
        ("submission_benchmark", "stable_diffusion", {}),
        ("submission_division", "closed", {}),
        ("seed", 3, {}),
        ("global_batch_size", 512, {}),
        ("opt_base_learning_rate", 6.4e-5, {}),
        ("eval_samples", 30000, {}),
        ("run_start", None, {}),
        ("block_start", "training_step", {"samples_count": 0}),
        ("block_stop", "training_step", at),
        ("eval_accuracy", 80.5, {**at, "metric": "FID"}),
        ("eval_accuracy", 0.17, {**at, "metric": "CLIP"}),
        ("run_stop", None, {**at, "status": "success"}),
    ]
    lines = (
        {"key": key, "value": value, "metadata": metadata, "time_ms": 1_700_000_000_000 + place}
        for place, (key, value, metadata) in enumerate(entries)
    )
    return "".join(f":::MLLOG {json.dumps(line)}\n" for line in lines).encode()


def _saved(save: Callable[[io.BytesIO], object]) -> bytes:
    stream = io.BytesIO()
    save(stream)
    return stream.getvalue()


def _feature_net() -> bytes:
    from safetensors.torch import save

    config = {"widths": [4], "features": 2, "image_size": 4}
    net = FeatureNet(FeatureNetConfig(widths=(4,), features=2, image_size=4))
    return save(net.state_dict(), {"config": json.dumps(config)})


def _pictures() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        keeper = Keeper(Path(folder), of="x")
        places, grid = torch.arange(2), torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
        keeper.add(Measured(places, torch.ones(2, 3), torch.ones(2), grid, []))
        keeper.flush()
        [path] = Path(folder).iterdir()
        return path.read_bytes()


def _encoded() -> bytes:
    layout = new_layout([b"a", b"b"], [b"a cat", b"a dog"], (8, 2, 2), (2, 3, 5))
    values = {
        "moments": np.ones((2, 8, 2, 2), "<f2"),
        "context": np.ones((2, 3, 5), "<f2"),
        "states": np.array([1, 0], "<i8"),
        "caption_ends": np.array([5, 10], "<i8"),
        "keys": np.array([b"a", b"b"]),
        "captions": np.frombuffer(b"a cata dog", "|u1"),
    }
    return layout.header() + b"".join(values[name].tobytes() for name in layout.arrays)


def _saved_index() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_indexed_shard(Path(folder))
        ShardIndex.open(folder)
        return (Path(folder) / INDEX_NAME).read_bytes()


_ROW = {"level": "op", "name": "a", "ok": True, "max_error": 0.5, "max_budget": "inf"}
_ROW |= {"rms_error": 0, "rms_budget": 1}
_LINE = {"samples": 8, "n": 2, "loss": 0.5, "lr": 1e-4, "samples_per_second": 9, "data_wait": 0.1}
_RECEIVED = {"artefact": "things", "url": None, "size": 0, "modified_ns": 1, "sha256": "0" * 64}
_RECEIVED |= {"published": {"md5": "0" * 32}, "time": "now"}
_TEXTS: dict[str, object] = {
    "json": {"a": [1, 2.5, None, True, "x"], "b": {"c": {}}},
    "manifest": {"config": {"training": {"seed": 3}}, "starts": [{"time": "now"}]},
    "parity": {"levels": ["op"], "rows": [_ROW]},
    "lines": _LINE,
    "report metrics": _LINE,
    "report kernels": [{"op": "adamw", "backend": "torch", "passed_over": {"triton": "why"}}],
    "report verdict": {"passed": True, "words": "passes"},
    "report grid": {"prompts": ["a", "b"], "columns": 2},
    "captions": {"file": "a.png", "captions": ["a cat", "a dog"], "width": 9},
    "receipt": {"files": {"a.tar": _RECEIVED}},
    "json text": [[1], {"a": 1e300}],
    "coco": {"annotations": [{"image_id": 1, "id": 2, "caption": "a cat"}]},
    "benchmarks": {
        "benchmark": "a",
        "provenance": {
            **{"date": "2026-01-01T00:00:00+00:00", "command": "python", "git_sha": "0"},
            **{"machine": {"cpu": "x"}, "versions": {"torch": "2"}},
        },
        "rows": [
            {"batch": 1, "dtype": "fp32", "cached": "nothing", "samples_per_second": 2.5},
            {"batch": 2, "dtype": "fp32", "cached": "nothing", "samples_per_second": 4},
        ],
        "details": {"note": ["a"]},
    },
}
SEEDS: dict[str, bytes] = {name: json.dumps(value).encode() for name, value in _TEXTS.items()}
"""for each reader, bytes that it takes, as a start for mutations"""
_MOMENTS, _CONTEXT = np.zeros((1, 8, 2, 2), np.float32), np.ones((3, 5), np.float16)
SEEDS |= {
    "preset": b"run:\n  dir: runs/a  # note\ntraining: {seed: 3, deterministic: yes}\n"
    b"model:\n  channel_mult: [1, 2, 4, 4]\noptimizer:\n  epsilon: 1e-8\n",
    "image": _png(),
    "shard": _tar(npy=_npy(_MOMENTS), txt=b"a cat", context_npy=_npy(_CONTEXT)),
    "raw shard": _tar(png=_png(), txt=b"a cat"),
    "raw samples": _tar(png=_png(), txt=b"a cat", json=b"{}"),
    "encoded shard": _encoded(),
    "moments": _npy(_MOMENTS),
    "context": _npy(_CONTEXT),
    "caption": b"a cat",
    "archive": _zip(),
    "photograph": _photograph(),
    "prompts": b'id\tcaption\n1\t"a ""red"" cat"\n2\ta dog\n',
    "table": b"file_name,text\na.png,a cat\n",
    "statistics": _saved(lambda stream: np.savez(stream, mu=np.zeros(2), sigma=np.eye(2))),
    "pickled weights": _saved(lambda stream: torch.save({"a": torch.ones(2, 2)}, stream)),
    "kept pictures": _pictures(),
    "list of digests": f"{'0' * 32}  ./a.tar\n{'1' * 128} *b/c.tar\n".encode(),
}
SEEDS |= dict.fromkeys(("index", "npz"), _saved_index())
SEEDS |= dict.fromkeys(("log", "progress"), _mllog())
SEEDS |= dict.fromkeys(("weights", "feature net"), _feature_net())
if find_spec("pyarrow"):
    SEEDS["metadata"] = _parquet()
