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
from pathlib import Path

import numpy as np

from sd_perf.config import DataConfig
from sd_perf.console import TextConsole
from sd_perf.data.encoded import new_layout
from sd_perf.data.images import load_image
from sd_perf.data.npz import read_npz
from sd_perf.data.prepare.captioned_images import load_captioned_image
from sd_perf.data.prepare.image_folder import read_images
from sd_perf.data.prepare.raw_shards import read_raw_shards
from sd_perf.data.samples import SampleReader, parse_caption, parse_context, parse_moments
from sd_perf.data.shards import INDEX_NAME, ShardIndex
from sd_perf.errors import UserError
from sd_perf.fetch.manifest import File, digests_listed
from sd_perf.fetch.progress import Watch
from sd_perf.fetch.receipt import RECEIPT, Receipt
from sd_perf.fetch.unpack import unpack
from sd_perf.files import parse_json, read_json
from sd_perf.presets import load_preset
from sd_perf.runs.folder import read_manifest, read_run_config
from sd_perf.runs.parity_record import read_record, rows_by_level, verdict
from sd_perf.runs.scores import read_scores, sort_out_lines
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
    "list of digests": f"{'0' * 32}  ./a.tar\n{'1' * 128} *b/c.tar\n".encode(),
}
SEEDS |= dict.fromkeys(("index", "npz"), _saved_index())
