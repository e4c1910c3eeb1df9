"""The record of a parity run, `parity.json`: its names, its place, what it says, what it proves.

A record has the digests of its config and code and the name of its device (`IDENTITY`), `levels`,
`ok`, `rows` (a comparison each, see `sd_perf.tools.parity.comparison.Comparison.as_dict`), `notes`,
`curves`, and the calls and launches that were counted (`executed`, `triton_launches`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args

import sd_kernels
import sd_perf
from sd_perf.config import Config
from sd_perf.errors import ConfigError
from sd_perf.files import misfit, read_json, require_shape

Level = Literal["op", "block", "unet", "grad", "step", "trajectory", "world"]
LEVELS: tuple[Level, ...] = get_args(Level)
"""from the smallest part of a run to whole runs"""
DEFAULT_LEVELS: tuple[Level, ...] = ("op", "block", "unet", "grad", "step")
"""levels that take seconds; a run that needs a record needs them all"""
Where = Literal["interpreter", "structure", "gpu"]
"""interpreter: tiny shapes, Triton's kernels in its interpreter, on a CPU; structure: the config's
own network on the operators that a CPU has; gpu: full size"""
RECORD_NAME = "parity.json"
IDENTITY = ("config", "code", "device")
"""keys in which a record must agree with a run that it stands for"""
_NUMBER = (float, {"nan", "inf", "-inf"})
_ROW = {
    "level": set(LEVELS),
    "name": str,
    "ok": bool,
    **dict.fromkeys(("max_error", "max_budget", "rms_error", "rms_budget"), _NUMBER),
}
_RECORD = {
    "levels": [str],
    "rows": [_ROW],
    "executed?": {},
    "triton_launches?": {},
    "notes?": [str],
    "curves?": {},
}
"""shape of a record, see `sd_perf.files.require_shape`"""
_SECTIONS = ("model", "diffusion", "optimizer", "kernels", "precision")


def record_folder(config: Config) -> Path:
    """The folder of the record: beside the run folder, or that of `mlperf.parity_record`."""
    run = Path(config.run.dir)
    if run.name in ("", ".."):  # of "." and the like
        run = run.resolve()
    named = config.mlperf.parity_record
    return Path(named).parent if named else run.parent / f"{run.name}.parity"


def config_digest(config: Config) -> str:
    """Twelve hexadecimal digits of the sections that decide how a step is computed."""
    computed = {name: dataclasses.asdict(getattr(config, name)) for name in _SECTIONS}
    computed["model"]["implementation"] = "fast"
    text = json.dumps({**computed, "training.precision": config.training.precision}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def code_digest() -> str:
    """Twelve hexadecimal digits of every Python file of sd_perf and sd_kernels."""
    digest = hashlib.sha256()
    for package in (sd_perf, sd_kernels):
        root = Path(package.__path__[0])
        for path in sorted(root.rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def device_name() -> str:
    """The GPU's name, or "cpu"."""
    import torch  # takes seconds; the command line reads the names of levels from this module

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def identity(config: Config) -> dict[str, str]:
    """What a record for this config, code and device has under the keys of `IDENTITY`."""
    return {"config": config_digest(config), "code": code_digest(), "device": device_name()}


def read_record(path: Path) -> dict[str, Any] | None:
    """A record; None where there is no file, UserError where it is damaged."""
    record = read_json(path)
    if record is not None:
        require_shape(record, _RECORD, f"{path}: is no parity record")
    return record


def require_green(config: Config) -> dict[str, Any]:
    """The record that proves the config's fast path with this code on this device.

    Raises ConfigError where there is none, or it is red, incomplete or of something else.
    """
    path = record_folder(config) / RECORD_NAME
    record = read_json(path)
    if reason := _reason_against(record, config):
        raise ConfigError(
            f"mlperf.division: {config.mlperf.division!r} with model.implementation 'fast' needs "
            f"a green parity record, and {path} {reason}; run `sd-perf parity` with the same "
            "--config and options first, or waive it by name with --mlperf.waive parity, which "
            "the log will say"
        )
    return record


def _reason_against(record: Any, config: Config) -> str:
    """Empty where the record is good."""
    if record is None:
        return "is not there"
    if fault := misfit(record, _RECORD):
        return f"is no parity record ({fault})"
    now = identity(config)
    for key in IDENTITY:
        if record.get(key) != now[key]:
            return f"is of another {key} ({record.get(key)}, here {now[key]})"
    missing = [level for level in DEFAULT_LEVELS if level not in record["levels"]]
    if missing:
        return f"lacks the level {missing[0]}"
    return "" if record.get("ok") is True else "is red"


def verdict(record: Mapping[str, Any]) -> str:
    """Green or red in one line, which names the first comparisons that are wrong."""
    rows = record["rows"]
    wrong = [row for row in rows if not row["ok"]]
    if not wrong:
        return f"green: {len(rows)} comparisons at {len(record['levels'])} levels"
    named = "; ".join(f"{row['level']}: {row['name']}" for row in wrong[:3])
    more = ", ..." if len(wrong) > 3 else ""
    return f"red: {len(wrong)} of {len(rows)} comparisons ({named}{more})"


def rows_by_level(record: Mapping[str, Any]) -> Iterator[tuple[Level, list[dict[str, Any]]]]:
    """The rows of each level that has some, in the order of the levels."""
    rows = sorted(record["rows"], key=lambda row: LEVELS.index(row["level"]))
    for level, some in groupby(rows, key=lambda row: row["level"]):
        yield level, list(some)


def closest_to_limit(rows: list[dict[str, Any]]) -> str:
    """The row that uses most of what it is allowed, in words."""
    share, name = max((_share_used(row), row["name"]) for row in rows)
    return f"{name}: {100 * share:.0f} % of what is allowed" if share else "all equal"


def _share_used(row: dict[str, Any]) -> float:
    pairs = ((row["max_error"], row["max_budget"]), (row["rms_error"], row["rms_budget"]))
    return max(
        (float(error) / float(budget) if budget else float(error != 0)) for error, budget in pairs
    )


def counts_in_words(counts: Mapping[str, int]) -> str:
    """Names and their counts, by name: "adamw 46, geglu 1,100"."""
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items()))
