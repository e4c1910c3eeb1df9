"""Every reader of files that a stranger may have made, as a function of a file's bytes.

A reader takes a folder and bytes, writes the bytes where its file lies, and reads. It must return,
or raise UserError with one sentence; `check` says so.
"""

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

from sd_perf.config import DataConfig
from sd_perf.console import TextConsole
from sd_perf.data.coco import read_coco_captions, split
from sd_perf.data.encoded import new_layout
from sd_perf.data.images import load_image
from sd_perf.data.laion.metadata import filter_metadata
from sd_perf.data.npz import read_npz
from sd_perf.data.prepare.captioned_images import load_captioned_image
from sd_perf.data.prepare.image_folder import read_images
from sd_perf.data.prepare.raw_shards import read_raw_shards
from sd_perf.data.samples import SampleReader, parse_caption, parse_context, parse_moments
from sd_perf.data.shards import INDEX_NAME, ShardIndex
from sd_perf.errors import UserError
from sd_perf.evaluation.feature_net import FeatureNet, FeatureNetConfig, read_feature_net
from sd_perf.evaluation.fid import Gaussian
from sd_perf.evaluation.measured import Keeper, Measured
from sd_perf.evaluation.prompts import read_prompts
from sd_perf.fetch.manifest import File, digests_listed
from sd_perf.fetch.progress import Watch
from sd_perf.fetch.receipt import RECEIPT, Receipt
from sd_perf.fetch.unpack import unpack
from sd_perf.files import parse_json, read_json
from sd_perf.mlperf.log import scan_log
from sd_perf.mlperf.notes import faults, notes
from sd_perf.mlperf.reference_curves import verdict as verdict_of_progress
from sd_perf.mlperf.results import read_results
from sd_perf.mlperf.rulesets import ruleset_of
from sd_perf.models.weight_files import read_ldm_checkpoint
from sd_perf.presets import load_preset
from sd_perf.runs.folder import read_manifest, read_run_config
from sd_perf.runs.parity_record import read_record, rows_by_level, verdict
from sd_perf.runs.scores import read_scores, sort_out_lines
from sd_perf.tools.report.benchmarks import write_benchmarks
from sd_perf.tools.report.convergence import read_progress
from sd_perf.tools.report.run_contents import read_run

Reader = Callable[[Path, bytes], object]
LONGEST_SENTENCE = 2000


def _preset(folder: Path, content: bytes) -> None:
    (folder / "preset.yaml").write_bytes(content)
    load_preset(folder / "preset.yaml")


def _json(folder: Path, content: bytes) -> None:
    (folder / "a.json").write_bytes(content)
    read_json(folder / "a.json")


def _manifest(folder: Path, content: bytes) -> None:
    (folder / "run_manifest.json").write_bytes(content)
    read_manifest(folder)
    read_run_config(folder)


def _lines(folder: Path, content: bytes) -> None:
    (folder / "scores.jsonl").write_bytes(content)
    sort_out_lines(folder / "scores.jsonl", ("samples", "loss"))
    read_scores(folder)


def _parity(folder: Path, content: bytes) -> None:
    (folder / "parity.json").write_bytes(content)
    if record := read_record(folder / "parity.json"):
        verdict(record), list(rows_by_level(record))


def _run(name: str) -> Reader:
    def read(folder: Path, content: bytes) -> None:
        (folder / "run_manifest.json").write_text(json.dumps({"config": {}, "starts": []}))
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        if name != "samples/samples_0000000001.png":
            (folder / "samples").mkdir(exist_ok=True)
            (folder / "samples/samples_0000000001.png").touch()
        read_run(folder)

    return read


def _captions(folder: Path, content: bytes) -> None:
    (folder / "a.png").touch()
    (folder / "captions.jsonl").write_bytes(content)
    read_images(folder)


def _image(folder: Path, content: bytes) -> None:
    (folder / "a.png").write_bytes(content)
    load_image(folder / "a.png", 8)


def _shard(folder: Path, content: bytes) -> None:
    (folder / "0.tar").write_bytes(content)
    config = DataConfig(path=str(folder), latent_size=2, context="precomputed", context_tokens=3)
    _read_samples(config)


def _raw_samples(folder: Path, content: bytes) -> None:
    (folder / "0.tar").write_bytes(content)
    config = DataConfig(format="raw", path=str(folder), latent_size=1, autoencoder="a.ckpt")
    _read_samples(config)


def _encoded_shard(folder: Path, content: bytes) -> None:
    (folder / "0.safetensors").write_bytes(content)
    options = {"latent_size": 2, "context": "precomputed", "context_tokens": 3}
    _read_samples(DataConfig(format="encoded", path=str(folder), **options))


def _read_samples(config: DataConfig) -> None:
    index = ShardIndex.open(config.path, format=config.format)
    reader = SampleReader(index, config, in_channels=4, context_dim=5)
    for sample in range(min(len(index), 4)):
        index.name(sample)
        reader.read(sample)


def _raw_shard(folder: Path, content: bytes) -> None:
    (folder / "0.tar").write_bytes(content)
    for sample in read_raw_shards(folder)[:4]:
        load_captioned_image(sample, 8)


def _index(folder: Path, content: bytes) -> None:
    _write_indexed_shard(folder)
    (folder / INDEX_NAME).write_bytes(content)
    index = ShardIndex.open(folder)
    index.name(len(index) - 1)


def _write_indexed_shard(folder: Path) -> None:
    """A shard whose time is always the same, so that an index of it is taken at another place."""
    path = folder / "0.tar"
    path.write_bytes(SEEDS["shard"])
    os.utime(path, ns=(1, 1))


def _receipt(folder: Path, content: bytes) -> None:
    (folder / RECEIPT).write_bytes(content)
    (folder / "a.tar").touch()
    receipt = Receipt(folder)
    receipt.vouches_for(File("a.tar"))
    receipt.recorded("things")


def _archive(folder: Path, content: bytes) -> None:
    (folder / "a.zip").write_bytes(content)
    (folder / "out").mkdir(exist_ok=True)
    unpack(folder / "a.zip", folder / "out", folder / "drafts", Watch(TextConsole(quiet=True)))


def _coco(folder: Path, content: bytes) -> None:
    (folder / "captions.json").write_bytes(content)
    split(read_coco_captions(folder / "captions.json"), 1)


def _prompts(folder: Path, content: bytes) -> None:
    (folder / "prompts.tsv").write_bytes(content)
    read_prompts(folder / "prompts.tsv", 1)


def _table(folder: Path, content: bytes) -> None:
    (folder / "a.png").touch()
    (folder / "metadata.csv").write_bytes(content)
    read_images(folder)


def _metadata(folder: Path, content: bytes) -> None:
    (folder / "a.parquet").write_bytes(content)
    filter_metadata(folder, folder / "filtered")


def _log(folder: Path, content: bytes) -> None:
    (folder / "result_0.txt").write_bytes(content)
    events, _ = scan_log(folder / "result_0.txt")
    list(faults(events, ruleset_of(events)[0]))
    list(notes(events))
    read_results([folder / "result_0.txt"], "5.0.0")


def _progress(folder: Path, content: bytes) -> None:
    (folder / "result_0.txt").write_bytes(content)
    for progress in read_progress([folder / "result_0.txt"]):
        verdict_of_progress(progress)


def _statistics(folder: Path, content: bytes) -> None:
    (folder / "a.npz").write_bytes(content)
    Gaussian.load_npz(folder / "a.npz")


def _result(folder: Path, content: bytes) -> None:
    (folder / "a.json").write_bytes(content)
    (folder / "b.json").write_bytes(SEEDS["benchmarks"])
    write_benchmarks(folder)


def _weights(name: str) -> Reader:
    def read(folder: Path, content: bytes) -> None:
        (folder / name).write_bytes(content)
        read_feature_net(folder / name) if "net" in name else read_ldm_checkpoint(folder / name)

    return read


def _kept(folder: Path, content: bytes) -> None:
    (folder / "pictures_00000000.safetensors").write_bytes(content)
    Keeper(folder, of="x").kept(lambda told: None)


def _bare(parse: Callable[[bytes], object]) -> Reader:
    """A function that raises ValueError with the bare reason, which its callers put in words."""

    def read(folder: Path, content: bytes) -> None:
        try:
            parse(content)
        except ValueError as error:
            raise UserError("a file cannot be read") from error

    return read


READERS: dict[str, Reader] = {
    "preset": _preset,
    "json": _json,
    "manifest": _manifest,
    "lines": _lines,
    "parity": _parity,
    "report metrics": _run("metrics.jsonl"),
    "report kernels": _run("kernels.json"),
    "report verdict": _run("mlperf_verdict.json"),
    "report grid": _run("samples/samples_0000000001.json"),
    "captions": _captions,
    "image": _image,
    "shard": _shard,
    "raw shard": _raw_shard,
    "raw samples": _raw_samples,
    "encoded shard": _encoded_shard,
    "index": _index,
    "npz": _bare(lambda content: read_npz(io.BytesIO(content))),
    "json text": _bare(parse_json),
    "moments": lambda folder, content: parse_moments(content, 4, 2),
    "context": lambda folder, content: parse_context(content, 3, 5),
    "photograph": _image,
    "coco": _coco,
    "prompts": _prompts,
    "table": _table,
    "metadata": _metadata,
    "log": _log,
    "progress": _progress,
    "statistics": _statistics,
    "benchmarks": _result,
    "pickled weights": _weights("a.ckpt"),
    "weights": _weights("a.safetensors"),
    "feature net": _weights("net.safetensors"),
    "kept pictures": _kept,
    "receipt": _receipt,
    "archive": _archive,
    "list of digests": lambda folder, content: digests_listed(content.decode(errors="replace"), ""),
    "caption": lambda folder, content: parse_caption(content, 20, allow_empty=False),
}


def check(name: str, folder: Path, content: bytes) -> bool:
    """Whether a reader takes the bytes. Any exception but UserError with a sentence goes on."""
    try:
        READERS[name](folder, content)
    except UserError as error:
        sentence = str(error)
        assert sentence and len(sentence) < LONGEST_SENTENCE, f"{name}: {len(sentence)} characters"
        assert "\n" not in sentence, f"{name}: {sentence}"
        return False
    return True


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
        _write_indexed_shard(Path(folder))
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
else:
    del READERS["metadata"]
