"""Every reader of files that a stranger may have made, as a function of a file's bytes.

A reader takes a folder and bytes, writes the bytes where its file lies, and reads. It must return,
or raise UserError with one sentence; `check` says so.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from sd_perf.config import DataConfig
from sd_perf.console import TextConsole
from sd_perf.data.coco import read_coco_captions, split
from sd_perf.data.images import load_image
from sd_perf.data.laion.metadata import filter_metadata
from sd_perf.data.npz import read_npz
from sd_perf.data.prepare.captioned_images import load_captioned_image
from sd_perf.data.prepare.image_folder import read_images
from sd_perf.data.prepare.raw_shards import read_raw_shards
from sd_perf.data.samples import SampleReader, parse_caption, parse_context, parse_moments
from sd_perf.data.shards import INDEX_NAME, ShardIndex
from sd_perf.errors import UserError
from sd_perf.evaluation.feature_net import read_feature_net
from sd_perf.evaluation.fid import Gaussian
from sd_perf.evaluation.measured import Keeper
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
from tests.fuzz.seeds import SEEDS, write_indexed_shard

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
    write_indexed_shard(folder)
    (folder / INDEX_NAME).write_bytes(content)
    index = ShardIndex.open(folder)
    index.name(len(index) - 1)


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


if not find_spec("pyarrow"):
    del READERS["metadata"]
