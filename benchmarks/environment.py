"""The hardware and software that rows are measured on, on a GPU or a CPU."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_environment import describe, software


def hardware(device: torch.device) -> dict[str, Any]:
    """The GPU (see `gpu_environment.describe`) or the CPU: its name, cores and threads."""
    if device.type == "cuda":
        return {**describe(), "gpus": torch.cuda.device_count()}
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions(*packages: str) -> dict[str, Any]:
    """Versions of Python, of torch and what it is made of, and of these packages; None: absent."""
    others = {package: _version(package) for package in ("numpy", *packages)}
    return {"python": platform.python_version(), **software(), **others}


def cpu_name() -> str:
    """Name of the CPU's model, or its architecture where Linux does not tell."""
    try:
        facts = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in facts.splitlines() if "model name" in line]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
