"""What is installed here, what is missing and needed for what, and which kernels can run."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from rich.text import Text

import sd_perf
from sd_kernels.registry import all_ops, source_digest
from sd_kernels.selection import choose, reasons_against
from sd_kernels.spec import Backend, OpSpec
from sd_kernels.targets import Target
from sd_perf.console import styled
from sd_perf.fast.choice import REFERENCE, target_named
from sd_perf.tools.results import KernelRow, read

RESULTS = Path(sd_perf.__file__).parents[1] / "benchmarks/results"
"""of a source checkout; an installed package has none, and then no kernel has a proof"""

# package, what it is for, how to get it
_PACKAGES = (
    ("torch", "everything", "pip install torch"),
    ("triton", "fused kernels on a GPU", "pip install triton"),
    ("numpy", "data", "pip install numpy"),
    ("tyro", "command line", "pip install 'sd-perf[cli]'"),
    ("rich", "command line", "pip install 'sd-perf[cli]'"),
    ("PyYAML", "presets", "pip install 'sd-perf[cli]'"),
    ("urllib3", "fetch", "pip install 'sd-perf[fetch]'"),
    ("safetensors", "checkpoints, export and import of weights", "pip install safetensors"),
    ("open-clip-torch", "text encoder in the step, sampling", "pip install 'sd-perf[text]'"),
    ("pillow", "data prepare, sampling", "pip install 'sd-perf[images]'"),
    ("simplejpeg", "decoding of JPEG in less time", "pip install 'sd-perf[jpeg]'"),
    ("nvidia-dali-cuda130", "data.loader dali", "pip install 'sd-perf[dali]'"),
    ("onnxruntime", "autoencoders in .onnx files", "pip install 'sd-perf[onnx]'"),
    ("matplotlib", "report, compare", "pip install 'sd-perf[report]'"),
    ("tensorboard", "logging.sinks", "pip install 'sd-perf[tensorboard]'"),
    ("wandb", "logging.sinks", "pip install 'sd-perf[wandb]'"),
    ("prometheus-client", "logging.prometheus", "pip install 'sd-perf[prometheus]'"),
    ("mlperf-logging", "MLPerf logs, mlperf check", "pip install 'sd-perf[mlperf]'"),
    ("diffusers", "tests only: an independent UNet", "pip install 'sd-perf[dev]'"),
)

_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
"""environment variable by which torch's allocator of GPU memory is set"""


def examine(target: str = "here", results: Path = RESULTS) -> dict[str, Any]:
    """Versions, devices, packages and kernels for the target, as JSON takes them."""
    device = target_named(target)
    runs = _runs(results)
    return {
        "sd_perf": sd_perf.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": _devices(),
        "allocator": os.environ.get(_ALLOCATOR),
        "packages": [
            {"package": name, "version": _version(name), "needed_for": purpose, "install": command}
            for name, purpose, command in _PACKAGES
        ],
        "target": {"name": device.name, "declared": target != "here"},
        "kernels": [_kernel(spec, device, runs) for spec in all_ops().values()],
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    cpu = {
        "device": "cpu",
        "name": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
    }
    gpus = []
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        capability = f"sm_{properties.major}{properties.minor}"
        gpu = {
            "device": f"cuda:{i}",
            "name": properties.name,
            "memory_bytes": properties.total_memory,
        }
        gpus.append(
            {**gpu, "capability": capability, "multiprocessors": properties.multi_processor_count}
        )
    return [cpu, *gpus]


def _kernel(spec: OpSpec, target: Target, runs: list[KernelRow]) -> dict[str, Any]:
    return {
        "op": spec.name,
        "summary": spec.summary,
        "auto": choose(spec.name, target=target, cases=spec.cases).backend,
        "backends": [_backend(spec, backend, target, runs) for backend in spec.backends],
    }


def _backend(
    spec: OpSpec, backend: Backend, target: Target, runs: list[KernelRow]
) -> dict[str, Any]:
    against = reasons_against(backend, target, spec.cases)
    mine = [run for run in runs if (run["op"], run["backend"]) == (spec.name, backend.name)]
    return {
        "backend": backend.name,
        "package": backend.package,
        "installed": _version(backend.package.split()[0]) if backend.package else None,
        "install": backend.install,
        "against": list(map(str, against)),
        "against_in_short": against[0].short if against else "",
        "automatic": backend.automatic,
        "ran_on": sorted({run["gpu"] for run in mine}),
        "changed_since": bool(mine)
        and all(run["source"] != source_digest(spec.name) for run in mine),
    }


def _runs(folder: Path) -> list[KernelRow]:
    """Rows of all committed kernel benchmarks that ran on a GPU with green parity."""
    results = (
        read(path, "kernel_speed", KernelRow) for path in sorted(folder.glob("kernels_*.json"))
    )
    return [row for result in results for row in result.rows if row["parity"]["ok"]]


def screen(report: dict[str, Any]) -> Iterable[Any]:
    """The report for a terminal, within one screen of 100 columns."""
    where = f", Python {report['python']}, {report['platform']}"
    yield Text.assemble(styled("bold", f"sd-perf {report['sd_perf']}"), where)
    yield _facts(report)
    target = report["target"]
    declared = ", as declared" if target["declared"] else ""
    more = "; sd-perf doctor --json: every reason, how to get each package"
    yield Text.assemble(
        styled("bold", f"kernels on {target['name']}"), declared, styled("dim", more)
    )
    yield _kernels_table(report["kernels"])
    yield from _adapted(report["kernels"])


def _facts(report: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    described = [(device["device"], _described(device)) for device in report["devices"]]
    for what, names in groupby(described, key=lambda pair: pair[1]):
        alike = [name for name, _ in names]
        table.add_row(alike[0] + (f" ... {alike[-1]}" if len(alike) > 1 else ""), what)
    if any("capability" in device for device in report["devices"]):
        table.add_row("allocator", f"{_ALLOCATOR}={report['allocator'] or '(not set)'}")
    there = [
        Text.assemble(f"{row['package']} ", styled("cyan", row["version"]))
        for row in report["packages"]
        if row["version"]
    ]
    table.add_row("packages", Text("  ").join(there))
    absent = (row for row in report["packages"] if not row["version"])
    for purpose, group in groupby(absent, key=lambda row: row["needed_for"]):
        rows = list(group)
        first, *others = (row["install"] for row in rows)
        words = f"{', '.join(row['package'] for row in rows)} ({purpose}): {first}"
        words += "".join(f" {other.removeprefix('pip install ')}" for other in others)
        table.add_row(styled("red", "missing"), words)
    return table


def _described(device: dict[str, Any]) -> str:
    if "threads" in device:
        return f"{device['name']}, {device['threads']} CPU threads"
    return f"{device['name']}, {device['memory_bytes'] / 2**30:.0f} GiB, {device['capability']}"


def _kernels_table(kernels: list[dict[str, Any]]) -> Table:
    """One row for each op and answer: backends of an op with the same answer share a row.

    The reference, which always runs, has none.
    """
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for column in ("op", "auto takes", "backends", "can they be had", "ran on"):
        table.add_column(column, no_wrap=column not in ("backends", "can they be had"))
    for kernel in kernels:
        first = (kernel["op"], kernel["auto"])
        others = [row for row in kernel["backends"] if row["backend"] != REFERENCE]
        alike: dict[tuple[tuple[str, str], tuple[str, str]], list[str]] = {}
        for row in others:
            answer = _availability(row, taken=row["backend"] == kernel["auto"]), _ran(row)
            alike.setdefault(answer, []).append(row["backend"])
        for ((availability, style), (gpus, warning)), names in alike.items():
            ran = Text.assemble(gpus, styled("yellow", warning))
            table.add_row(*first, ", ".join(names), Text(availability, style), ran)
            first = ("", "")
    return table


def _availability(row: dict[str, Any], *, taken: bool) -> tuple[str, str]:
    """Whether the backend can run, in few words, and their style; --json has every reason."""
    if row["against_in_short"]:
        return f"no: {row['against_in_short']}", "dim"
    if taken:
        return "yes, taken", "green"
    return "yes" if row["automatic"] else "yes, when named", ""


def _ran(row: dict[str, Any]) -> tuple[str, str]:
    """The GPUs that a backend ran on, and what is to be said of that in yellow."""
    if not row["ran_on"]:
        return "", "never"
    return ", ".join(row["ran_on"]), " (changed since)" if row["changed_since"] else ""


def _adapted(kernels: list[dict[str, Any]]) -> Iterable[Any]:
    """The version of each adapted package that its adapters fit, and the one installed: a line for
    each that is there, one for all that are not."""
    packages: dict[tuple[str, str | None], list[str]] = {}
    for kernel in kernels:
        for row in (row for row in kernel["backends"] if row["package"]):
            packages.setdefault((row["package"], row["installed"]), []).append(
                f"{kernel['op']}/{row['backend']}"
            )
    table = Table.grid(padding=(0, 2))
    absent = []
    for (package, installed), users in packages.items():
        if installed:
            words = f"signature bound to {package}; {installed} is installed"
            table.add_row(", ".join(users), words)
        else:
            absent.append(f"{package} ({', '.join(users)})")
    if absent:
        table.add_row("not there", f"signatures bound to {', '.join(absent)}")
    return [table] if table.row_count else []
