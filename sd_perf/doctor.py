"""What is installed here, what is not and what that costs, and what torch can compute on."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

import sd_perf

# package, what it is for, how to get it
_PACKAGES = (
    ("torch", "everything", "pip install torch"),
    ("triton", "fused kernels on a GPU", "pip install triton"),
    ("numpy", "data", "pip install numpy"),
    ("tyro", "command line", "pip install 'sd-perf[cli]'"),
    ("rich", "command line", "pip install 'sd-perf[cli]'"),
    ("PyYAML", "presets", "pip install 'sd-perf[cli]'"),
    ("safetensors", "export and import of weights", "pip install 'sd-perf[cli]'"),
    ("open-clip-torch", "text encoder in the step, sampling", "pip install 'sd-perf[text]'"),
    ("pillow", "data prepare, sampling", "pip install 'sd-perf[images]'"),
    ("onnxruntime", "autoencoders in .onnx files", "pip install 'sd-perf[onnx]'"),
    ("matplotlib", "report", "pip install 'sd-perf[report]'"),
    ("diffusers", "tests only: an independent UNet", "pip install 'sd-perf[dev]'"),
)


def examine() -> dict[str, Any]:
    """Versions, devices and packages, as JSON takes them."""
    return {
        "sd_perf": sd_perf.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": _devices(),
        "packages": [
            {"package": name, "version": _version(name), "needed_for": purpose, "install": command}
            for name, purpose, command in _PACKAGES
        ],
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    cpu = {"device": "cpu", "name": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    gpus = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        capability = f"sm_{properties.major}{properties.minor}"
        gpu = {"device": f"cuda:{i}", "name": properties.name, "memory_bytes": properties.total_memory}
        gpus.append({**gpu, "capability": capability, "multiprocessors": properties.multi_processor_count})
    return [cpu, *gpus]
