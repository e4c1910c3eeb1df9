"""Comparisons of parity for tests of the record and its reports."""

from __future__ import annotations

import dataclasses
from typing import Any

from sd_perf.tools.parity.comparison import Comparison, Errors

GOOD = Comparison(
    level="unet",
    name="prediction",
    where="structure",
    dtype="float32",
    error=Errors(max=1e-7, rms=1e-7),
    torch_error=Errors(max=1e-7, rms=1e-7),
    allowed=Errors(max=7e-7, rms=7e-7),
)
WRONG = dataclasses.replace(
    GOOD,
    level="block",
    name="input_blocks.1.0 (ResBlock)",
    error=Errors(max=1.0, rms=1.0),
)
CURVE = dataclasses.replace(
    GOOD,
    level="trajectory",
    name="loss over 200 steps",
    error=Errors(max=1e-3, rms=1e-3),
    torch_error=Errors(max=1e-3, rms=1e-3),
    allowed=Errors(max=1e-3, rms=1e-3),
)


def record_of(*lines: Comparison) -> dict[str, Any]:
    """A record of these comparisons with all that reports read."""
    rows = [line.as_dict() for line in lines]
    return {
        "config": "c0",
        "code": "c1",
        "device": "cpu",
        "ok": all(row["ok"] for row in rows),
        "levels": sorted({row["level"] for row in rows}),
        "date": "2026-01-01T00:00:00+00:00",
        "command": "sd-perf parity",
        "git_sha": None,
        "versions": {"torch": "2"},
        "executed": {"structure": {"geglu": {"torch": 3}}},
        "triton_launches": {"geglu_forward_kernel": 1200},
        "notes": ["a note"],
        "curves": {"plain": [0.5], "fast": [0.25]},
        "rows": rows,
    }
