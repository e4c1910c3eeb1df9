"""The run folder: its manifest, who may write into it, and what a resumed run must not have
changed."""

from __future__ import annotations

import dataclasses
import datetime
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
from sd_perf.errors import ConfigError, UserError
from sd_perf.files import disk_errors, one_line, read_json, write_json
from sd_perf.presets import config_differences, config_from_dict
from sd_perf.runs.checkpoints import CheckpointStore, read_state

# A resumed run may differ from its beginning in these: they change where and how, not what is
# computed.
_FREE_KEYS = (
    "run.",
    "logging.",
    "checkpoint.",
    "sampling.",
    "evaluation.",
    "data.path",
    "data.index",
    "data.workers",
    "data.prefetch_batches",
    "data.max_bad_samples",
    "training.max_samples",
    "training.device",
    "training.accumulate_steps",
    "training.cpu_threads",
    "text_encoder.weights",
    "kernels.",
    *(f"model.{name}" for name in SPEED_ONLY),
)

_PACKAGES = ("torch", "triton", "numpy", "open-clip-torch", "safetensors")


def settle_run(config: Config, resume: bool, fresh: bool = False) -> Config:
    """The config with its seed settled, where the folder `config.run.dir` lets this run begin.
    Writes nothing.

    Raises UserError for a folder that holds a run (without `resume` or `fresh`) or a run of another
    config.
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
    config: Config, resume: bool, fresh: bool = False, records: Mapping[str, Any] | None = None
) -> Config:
    """Claim the folder for this run, with an earlier one moved aside if `fresh`; returns what
    `settle_run` does.

    `records` are JSON files, by name, that tell how this start came about; those that are None are
    left out.

    Raises UserError where that does, and for a folder that cannot be written or moved.
    """
    config = settle_run(config, resume, fresh)
    folder = Path(config.run.dir)
    if fresh and _holds_run(folder):
        print(f"{folder}: the earlier run is now {_move_aside(folder)}")
    starts = read_manifest(folder)["starts"] if _holds_run(folder) else []
    start = {"time": _now(), "command": shlex.join(sys.argv), "host": platform.node()}
    manifest = {"config": dataclasses.asdict(config), **provenance(), "starts": [*starts, start]}
    with disk_errors(folder, "make room there, or choose another --run.dir"):
        folder.mkdir(parents=True, exist_ok=True)
        for name, record in (records or {}).items():
            if record is not None:
                write_json(folder / name, record)
        write_json(folder / "run_manifest.json", manifest)
    return config


def read_manifest(folder: Path) -> dict[str, Any]:
    """`run_manifest.json` of a run folder."""
    path = folder / "run_manifest.json"
    if not path.is_file():
        raise UserError(
            f"{folder}: is no run folder (no run_manifest.json); give one that sd-perf train has "
            "made"
        )
    manifest = read_json(path)
    parts = (
        (manifest.get("config"), manifest.get("starts"))
        if isinstance(manifest, dict)
        else (None, None)
    )
    if not (isinstance(parts[0], dict) and are_objects(parts[1])):
        raise UserError(f"{path}: holds no config and starts of a run; restore it from a copy")
    return manifest


def are_objects(value: Any) -> bool:
    """Whether this is a list of JSON objects."""
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def read_run_config(folder: Path) -> Config:
    """The config a run was made with."""
    try:
        return config_from_dict(read_manifest(folder)["config"])
    except ConfigError as error:
        raise ConfigError(f"{folder / 'run_manifest.json'}: {error}") from error


def read_scores(folder: Path, keys: tuple[str, ...] = ("samples", "n")) -> list[dict[str, Any]]:
    """One line of `scores.jsonl` per evaluated position, oldest first; the latest evaluation of
    each counts."""
    lines, _ = read_lines(folder / "scores.jsonl", keys)
    by_position = {line["samples"]: line for line in lines}
    return [by_position[samples] for samples in sorted(by_position)]


def read_lines(path: Path, keys: tuple[str, ...]) -> tuple[list[dict[str, Any]], bool]:
    """Objects that hold numbers under `keys`, one per line; and whether a torn last line was left
    out."""
    if not path.is_file():
        return [], False
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: cannot be read ({one_line(error)}); restore it from a copy"
        ) from error
    objects: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                return objects, True
            raise UserError(
                f"{path}: line {number} cannot be read ({one_line(error)}); mend or remove it"
            ) from error
        if not (
            isinstance(value, dict) and all(isinstance(value.get(key), int | float) for key in keys)
        ):
            raise UserError(
                f"{path}: line {number} lacks a number for one of {', '.join(keys)}; mend or "
                "remove it"
            )
        objects.append(value)
    return objects, False


def provenance() -> dict[str, Any]:
    """Versions, git SHA and machine, for the manifest and for reports."""
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
    """UserError for a run that was stopped on its way: moving it aside is easily regretted."""
    newest = CheckpointStore(folder / "checkpoints").newest()
    if newest is None:
        return
    samples, total = (
        read_state(newest).get("samples", 0),
        read_run_config(folder).training.max_samples,
    )
    if samples < total:
        raise UserError(
            f"{folder}: holds an unfinished run ({samples:,} of {total:,} samples); continue it "
            "with --resume instead "
            f"of --fresh (`make resume` for the smoke run), or move the folder away yourself"
        )


def _move_aside(folder: Path) -> Path:
    """Rename runs/smoke to runs/smoke.1, or the first number that is free; nothing is replaced."""
    if Path.cwd().is_relative_to(folder.resolve()):
        raise UserError(f"{folder}: cannot be moved aside from within; start from another folder")
    names = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
    free = next(name for name in names if not os.path.lexists(name))
    with disk_errors(free, "move the run yourself, or choose another --run.dir"):
        return folder.rename(free)


def _same_run(config: Config, folder: Path) -> Config:
    old = read_run_config(folder)
    config = _with_seed(config, old.training.seed)
    for key, (was, now) in config_differences(old, config).items():
        if not key.startswith(_FREE_KEYS):
            raise ConfigError(
                f"{key}: the run in {folder} has {was!r}, this config {now!r}; resume it "
                f"with the config it was made with, or choose another --run.dir"
            )
    return config


def _with_seed(config: Config, seed: int | None = None) -> Config:
    """The config with a seed: its own, else the given one, else one from system entropy."""
    if config.training.seed is not None:
        return config
    drawn = secrets.randbits(63) if seed is None else seed
    return dataclasses.replace(config, training=dataclasses.replace(config.training, seed=drawn))


def _git_sha() -> str | None:
    """HEAD of the checkout the package runs from ("+changes" where it is not clean); None outside a
    checkout."""
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
