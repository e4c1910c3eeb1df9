"""The record of a parity run, and whether one stands for a config, this code and this device.

Shape of `parity.json`: digests of config and code, device, levels, `ok`, and the rows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import torch

import sd_kernels
import sd_perf
from sd_perf.config import Config
from sd_perf.errors import ConfigError
from sd_perf.files import read_json

LEVELS = ("op", "block", "unet", "grad", "step", "trajectory", "world")
USUAL = LEVELS[:5]
"""levels that take seconds; a recipe needs them all"""
NAME = "parity.json"
IDENTITY = ("config", "code", "device")
"""what a record must agree in to stand for a run"""
_SECTIONS = ("model", "diffusion", "optimizer", "kernels", "precision")


def record_folder(config: Config) -> Path:
    """Where the record of a run's parity lies: beside the run folder, unless mlperf.parity_record
    names a file."""
    run = Path(config.run.dir)
    named = config.mlperf.parity_record
    return Path(named).parent if named else run.with_name(f"{run.name}.parity")


def config_digest(config: Config) -> str:
    """Of what decides how a step is computed."""
    computed = {
        name: dataclasses.asdict(getattr(config, name))
        for name in _SECTIONS
        if hasattr(config, name)
    }
    computed["model"]["implementation"] = "fast"
    text = json.dumps({**computed, "training.precision": config.training.precision}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def code_digest() -> str:
    """Of every source file of both packages."""
    digest = hashlib.sha256()
    for package in (sd_perf, sd_kernels):
        root = Path(package.__path__[0])
        for path in sorted(root.rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def device_name() -> str:
    """What a record holds for: the GPU's name, or the CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def identity(config: Config) -> dict[str, str]:
    """What a record must agree in."""
    return {"config": config_digest(config), "code": code_digest(), "device": device_name()}


def require_green(config: Config) -> dict[str, Any]:
    """The record that proves the config's fast path here and now; ConfigError with the reason where
    there is none."""
    path = record_folder(config) / NAME
    record = read_json(path)
    if reason := _reason_against(record, config):
        raise ConfigError(
            f"mlperf.division: {config.mlperf.division!r} with model.implementation 'fast' needs "
            "a green parity "
            f"record, and {path} {reason}; run `sd-perf parity` with the same --config and "
            "options first, or waive it "
            f"by name with --mlperf.waive parity, which the log will say"
        )
    return record


def _reason_against(record: Any, config: Config) -> str:
    """Empty where the record is good."""
    if record is None:
        return "is not there"
    if not (isinstance(record, dict) and isinstance(record.get("rows"), list)):
        return "is no parity record"
    now = identity(config)
    for key in IDENTITY:
        if record.get(key) != now[key]:
            return f"is of another {key} ({record.get(key)}, here {now[key]})"
    missing = [level for level in USUAL if level not in record.get("levels", ())]
    if missing:
        return f"lacks the level {missing[0]}"
    return "" if record.get("ok") is True else "is red"
