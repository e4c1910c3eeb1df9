"""The run folder: its manifest, who may write into it, and what a resumed run must not have changed."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import platform
import secrets
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import sd_perf
from sd_perf.config import Config
from sd_perf.errors import ConfigError, UserError
from sd_perf.files import one_line, write_json
from sd_perf.presets import config_differences, config_from_dict

# A resumed run may differ from its beginning in these: they change where and how, not what is computed.
_FREE_KEYS = ("run.", "logging.", "checkpoint.", "sampling.", "data.path", "data.index", "data.workers",
              "data.prefetch_batches", "data.max_bad_samples", "training.max_samples", "training.device",
              "training.accumulate_steps", "text_encoder.weights")  # fmt: skip

_PACKAGES = ("torch", "triton", "numpy", "open-clip-torch", "safetensors")


def open_run(config: Config, resume: bool) -> Config:
    """Claim the folder `config.run.dir` for this run; returns the config with its seed settled.

    Raises UserError for a folder that holds a run (without `resume`), a run of another config, or cannot be written.
    """
    folder = Path(config.run.dir)
    manifest_path = folder / "run_manifest.json"
    if manifest_path.is_file():
        if not resume:
            raise UserError(f"{folder}: holds a run already; continue it with --resume or choose another --run.dir")
        config = _same_run(config, manifest_path)
        starts = read_manifest(folder)["starts"]
    else:
        config = _with_seed(config)
        starts = []
    start = {"time": _now(), "command": shlex.join(sys.argv), "host": platform.node()}
    manifest = {"config": dataclasses.asdict(config), **provenance(), "starts": [*starts, start]}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(manifest_path, manifest)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({one_line(error)}); choose another --run.dir") from error
    return config


def read_manifest(folder: Path) -> dict[str, Any]:
    """`run_manifest.json` of a run folder."""
    path = folder / "run_manifest.json"
    if not path.is_file():
        raise UserError(f"{folder}: not a run folder (no run_manifest.json)")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: damaged ({one_line(error)})") from error


def read_run_config(folder: Path) -> Config:
    """The config a run was made with."""
    return config_from_dict(read_manifest(folder)["config"])


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


def _same_run(config: Config, manifest_path: Path) -> Config:
    old = read_run_config(manifest_path.parent)
    config = _with_seed(config, old.training.seed)
    for key, (was, now) in config_differences(old, config).items():
        if not key.startswith(_FREE_KEYS):
            raise ConfigError(f"{key}: the run in {manifest_path.parent} has {was!r}, this config {now!r}; resume it "
                              f"with the config it was made with, or choose another --run.dir")  # fmt: skip
    return config


def _with_seed(config: Config, seed: int | None = None) -> Config:
    """The config with a seed: its own, else the given one, else one from system entropy."""
    if config.training.seed is not None:
        return config
    drawn = secrets.randbits(63) if seed is None else seed
    return dataclasses.replace(config, training=dataclasses.replace(config.training, seed=drawn))


def _git_sha() -> str | None:
    """HEAD of the checkout the package runs from ("+changes" where it is not clean); None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        sha = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return sha.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
