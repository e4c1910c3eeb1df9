"""The run folder: its manifest, and whether a new start may use it.

A start may use a folder that holds no run, continue the run in it (`resume`, with a config that
computes the same), or move that run aside (`fresh`).
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import itertools
import json
import os
import platform
import secrets
import shlex
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import sd_perf
from sd_perf.config import SPEED_ONLY, Config
from sd_perf.errors import CheckpointError, ConfigError, UserError
from sd_perf.files import disk_errors, read_json, write_json
from sd_perf.presets import config_differences, config_from_dict
from sd_perf.runs.checkpoint_files import GO_BACK
from sd_perf.runs.checkpoints import CheckpointStore, position
from sd_perf.runs.lock import RunLock
from sd_perf.visible import visible

# Keys, or starts of keys, that a resumed run may change: they say where and how a run computes, not
# what it computes.
_FREE_KEYS = (
    "run.",
    "logging.",
    "profile.",
    "checkpoint.",
    "sampling.",
    "evaluation.",
    "data.path",
    "data.autoencoder",
    "data.resume_in_another_format",
    "data.index",
    "data.workers",
    "data.prefetch_batches",
    "data.max_bad_samples",
    "training.max_samples",
    "training.device",
    "training.accumulate_steps",
    "training.cpu_threads",
    "training.cuda_graph",
    "training.strategy",
    "text_encoder.weights",
    "kernels.",
    *(f"model.{name}" for name in SPEED_ONLY),
)
# What data.resume_in_another_format lets change, too: how the same samples are stored and read.
_FORMAT_KEYS = ("data.format", "data.context", "data.image_range", "data.loader")

_ELSEWHERE = "make room there, or choose another --run.dir"
_PACKAGES = ("torch", "triton", "numpy", "open-clip-torch", "safetensors")


def settle_run(config: Config, *, resume: bool, fresh: bool = False) -> Config:
    """Decide whether this run may start in `config.run.dir`; returns the config with its seed.

    Writes nothing. The seed is the config's, else that of the run to resume, else a new one from
    the system's entropy. Raises UserError for a folder that holds a run (without `resume` or
    `fresh`), a run of another config (`resume`), or an unfinished run (`fresh`).
    """
    if resume and fresh:
        raise UserError(
            "--resume continues the run in the folder and --fresh moves it aside; give one of them"
        )
    folder = Path(config.run.dir)
    if fresh:
        _require_finished(folder)
    if fresh or not _holds_run(folder):
        return _with_seed(config)
    if resume:
        return _same_run(config, folder)
    raise UserError(
        f"{folder}: holds a run already; continue it with --resume, move it aside with --fresh, "
        "or choose another "
        f"--run.dir"
    )


def open_run(
    config: Config,
    *,
    resume: bool,
    fresh: bool = False,
    records: Mapping[str, Any] | None = None,
    lock: RunLock | None = None,
) -> Config:
    """Claim the folder for this run: write its manifest; returns what `settle_run` returns.

    `fresh` moves an earlier run aside first. `records` are further JSON files to write, {file name:
    content}, such as the choice of kernels; those with content None are left out. `lock` is moved
    to the folder, which may be a new one, before anything is written there. Raises UserError where
    `settle_run` does, and for a folder that cannot be written or moved.
    """
    config = settle_run(config, resume=resume, fresh=fresh)
    folder = Path(config.run.dir)
    if fresh and _holds_run(folder):
        print(visible(f"{folder}: the earlier run is now {_move_aside(folder)}"))
    if lock is not None:
        with disk_errors(folder, _ELSEWHERE):
            folder.mkdir(parents=True, exist_ok=True)
        lock.take(folder)
        # Another start may have come first.
        config = settle_run(config, resume=resume, fresh=False)
    earlier = read_manifest(folder) if _holds_run(folder) else {}
    start = {"time": _now(), "command": shlex.join(sys.argv), "host": platform.node()}
    manifest = {
        "run_id": earlier.get("run_id") or secrets.token_hex(16),
        "config": dataclasses.asdict(config),
        **provenance(),
        "starts": [*earlier.get("starts", []), start],
    }
    with disk_errors(folder, _ELSEWHERE):
        folder.mkdir(parents=True, exist_ok=True)
        for name, record in (records or {}).items():
            if record is not None:
                write_json(folder / name, record)
        write_json(folder / "run_manifest.json", manifest)
    return config


def read_manifest(folder: Path) -> dict[str, Any]:
    """`run_manifest.json` of a run folder; UserError where it is missing or damaged."""
    path = folder / "run_manifest.json"
    if not path.is_file():
        raise UserError(
            f"{folder}: is no run folder (no run_manifest.json); give one that sd-perf train has "
            "made"
        )
    manifest = read_json(path)
    if not (
        isinstance(manifest, dict)
        and isinstance(manifest.get("config"), dict)
        and are_objects(manifest.get("starts"))
    ):
        raise UserError(f"{path}: holds no config and starts of a run; restore it from a copy")
    return manifest


def run_length(manifest: Mapping[str, Any]) -> int | None:
    """Length of a run in samples, whole steps; None where its manifest does not say."""
    training = manifest["config"].get("training")
    training = training if isinstance(training, dict) else {}
    length, batch = training.get("max_samples"), training.get("global_batch_size")
    if not (isinstance(length, int) and isinstance(batch, int) and batch > 0):
        return None
    return -(-length // batch) * batch


def are_objects(value: Any) -> bool:
    """Whether a value from a JSON file is a list of objects."""
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def read_run_config(folder: Path) -> Config:
    """The config of a run, from its manifest; ConfigError where this version cannot take it."""
    try:
        return config_from_dict(read_manifest(folder)["config"])
    except ConfigError as error:
        raise ConfigError(f"{folder / 'run_manifest.json'}: {error}") from error


def read_run_id(folder: Path) -> str:
    """The id that was drawn when the run was opened; UserError where the manifest has none."""
    run_id = read_manifest(folder).get("run_id")
    if not isinstance(run_id, str):
        raise UserError(f"{folder / 'run_manifest.json'}: holds no run_id; restore it from a copy")
    return run_id


def draw_run_id(folder: Path) -> str:
    """The run's id; one is drawn and written where the manifest has none, as older versions did."""
    manifest = read_manifest(folder)
    if "run_id" not in manifest:
        write_json(folder / "run_manifest.json", {"run_id": secrets.token_hex(16), **manifest})
    return read_run_id(folder)


def require_of_run(checkpoint: Path, state: Mapping[str, Any], folder: Path) -> None:
    """CheckpointError where a checkpoint's state has not the id of the run in `folder`."""
    run_id = read_run_id(folder)
    if state["run_id"] != run_id:
        raise CheckpointError(
            f"{checkpoint}: is of another run ({state['run_id']}, the run in {folder} is "
            f"{run_id}); {GO_BACK}"
        )


def config_digest(config: Config) -> str:
    """SHA-256 of the keys that a resumed run must not change and that differ from the defaults.

    A key that a later version adds changes no digest while it has its default.
    """
    changed = config_differences(Config(), config)
    fixed = {key: now for key, (_, now) in changed.items() if not key.startswith(_FREE_KEYS)}
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()


def provenance() -> dict[str, Any]:
    """Versions of packages, git SHA and machine, for the manifest and for reports."""
    versions = {"sd-perf": sd_perf.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": versions,
        "git_sha": _git_sha(),
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "gpus": devices},
    }


def _holds_run(folder: Path) -> bool:
    return any(
        (folder / name).exists() for name in ("run_manifest.json", "metrics.jsonl", "checkpoints")
    )


def _require_finished(folder: Path) -> None:
    """UserError for an unfinished run: `--fresh` in place of `--resume` is easily regretted."""
    newest = CheckpointStore(folder / "checkpoints").newest()
    if newest is None:
        return
    samples = position(newest)
    total = read_run_config(folder).training.max_samples
    if samples < total:
        raise UserError(
            f"{folder}: holds an unfinished run ({samples:,} of {total:,} samples); continue it "
            "with --resume instead "
            f"of --fresh (`make resume` for the smoke run), or move the folder away yourself"
        )


def _move_aside(folder: Path) -> Path:
    """Rename runs/smoke to runs/smoke.1, or to the first free number. Nothing is replaced."""
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UserError(f"{folder}: cannot be moved aside from within; start from another folder")
    names = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
    free = next(name for name in names if not os.path.lexists(name))
    with disk_errors(free, "move the run yourself, or choose another --run.dir"):
        return folder.rename(free)


def _same_run(config: Config, folder: Path) -> Config:
    """The config with the seed of the run in the folder; ConfigError where it computes another."""
    for path in sorted(folder.iterdir()):
        # Opening a FIFO would wait for ever, and a link to nothing would put the file elsewhere.
        if not (path.is_file() or path.is_dir()):
            raise UserError(f"{path}: is neither a file nor a folder; remove it to resume the run")
    old = read_run_config(folder)
    config = _with_seed(config, old.training.seed)
    free = (*_FREE_KEYS, *(_FORMAT_KEYS if config.data.resume_in_another_format else ()))
    for key, (was, now) in config_differences(old, config).items():
        if not key.startswith(free):
            another = ", set data.resume_in_another_format" if key == "data.format" else ""
            raise ConfigError(
                f"{key}: the run in {folder} has {was!r}, this config {now!r}; resume it "
                f"with the config it was made with{another}, or choose another --run.dir"
            )
    return config


def _with_seed(config: Config, seed: int | None = None) -> Config:
    """The config with a seed: its own, else the given one, else one from the system's entropy."""
    if config.training.seed is not None:
        return config
    drawn = secrets.randbits(63) if seed is None else seed  # 63 bits: an int64 without sign
    return dataclasses.replace(config, training=dataclasses.replace(config.training, seed=drawn))


def _git_sha() -> str | None:
    """HEAD of the checkout that the package runs from, with "+changes" where it is not clean.

    None outside a checkout.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        sha = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        )
        changes = subprocess.run(
            [*git, "status", "--porcelain"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return sha.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
