"""The system description of a submission: 33 fields, as many as the machine tells of itself."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import torch

from sd_perf.errors import DataError, UserError
from sd_perf.files import disk_errors, misfit, quoted, read_json, written_aside
from sd_perf.mlperf.log import import_mlperf
from sd_perf.mlperf.official import listen

STATUS = {
    "onprem": "Available on-premise",
    "cloud": "Available cloud",
    "research": "Research, Development, or Internal (RDI)",
    "preview": "Preview",
}
"""as `mlperf.status` names it: as the system description does"""
FIELDS = (
    *("submitter", "division", "status", "system_name", "number_of_nodes"),
    *("host_processors_per_node", "host_processor_model_name", "host_processor_core_count"),
    *("host_processor_vcpu_count", "host_processor_frequency", "host_processor_caches"),
    *("host_processor_interconnect", "host_memory_capacity", "host_storage_type"),
    *("host_storage_capacity", "host_networking", "host_networking_topology"),
    *("host_memory_configuration", "accelerators_per_node", "accelerator_model_name"),
    *("accelerator_host_interconnect", "accelerator_frequency", "accelerator_on-chip_memories"),
    *("accelerator_memory_configuration", "accelerator_memory_capacity"),
    *("accelerator_interconnect", "accelerator_interconnect_topology", "cooling", "hw_notes"),
    *("framework", "other_software_stack", "operating_system", "sw_notes"),
)
"""in the order of published descriptions; the official checker wants each of them"""
_MAY_BE_EMPTY = ("hw_notes", "sw_notes")


def describe_system(named: Mapping[str, str], root: Path = Path("/")) -> dict[str, str]:
    """All FIELDS, from what this machine says of itself; "" where it does not.

    `named` has the fields that a person gives; they go before the machine's. `root` is where /proc,
    /sys and /etc lie. Raises UserError for a field that there is not.
    """
    for field in named:
        if field not in FIELDS:
            raise UserError(f"{field}: is no field of a system description ({', '.join(FIELDS)})")
    facts = {
        **_processors(root),
        **_memory_and_disks(root),
        "host_networking": _network(root),
        **_accelerators(),
        **_software(root),
        **named,
    }
    return {field: str(facts.get(field, "")) for field in FIELDS}


def blanks(description: Mapping[str, str]) -> list[str]:
    """The fields that a person has to fill in."""
    return [
        name
        for name in FIELDS
        if name not in _MAY_BE_EMPTY and not description.get(name, "").strip()
    ]


def write_system(path: Path, description: Mapping[str, str]) -> None:
    """Write a description to a new file. UserError where there is one: a person may have filled
    it in."""
    if path.exists():
        raise UserError(f"{path}: exists already; move it away, or name another --output")
    with disk_errors(path, "make room there, or name another --output"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as draft:
            text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
            draft.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_system(path: Path) -> dict[str, str]:
    """A description from a file. DataError where a field is missing or no text, which stops the
    official tools with an error of Python."""
    value = read_json(path)
    if value is None:
        raise DataError(f"{path}: no such system description; sd-perf mlperf system writes one")
    if fault := misfit(value, dict.fromkeys(FIELDS, str)):
        raise DataError(f"{path}: is no system description ({fault}); all 33 fields are text")
    if value["status"] not in STATUS.values():
        options = "; ".join(STATUS.values())
        raise DataError(f"{path}: status is {quoted(value['status'])}; it must be one of {options}")
    return value


def official_faults(path: Path, ruleset: str) -> list[str]:
    """What mlperf-logging's checker of system descriptions says against the file."""
    module = import_mlperf("system_desc_checker.system_desc_checker")
    (valid, *_), said = listen(module.check_system_desc, str(path), "training", ruleset)
    return [] if valid else [line.strip() for line in said]


def _processors(root: Path) -> dict[str, str]:
    """Of /proc/cpuinfo; counts of cores and threads are those of one processor."""
    text = _read(root / "proc/cpuinfo")
    blocks = [_pairs(block) for block in text.split("\n\n") if block.strip()]
    if not blocks:
        return {}
    sockets = {block.get("physical id", "0") for block in blocks}
    first = blocks[0]
    cores = {(block.get("physical id"), block.get("core id")) for block in blocks}
    count = len(cores) // len(sockets) if "core id" in first else int(first.get("cpu cores") or 0)
    cpu = root / "sys/devices/system/cpu/cpu0"
    top = _read(cpu / "cpufreq/cpuinfo_max_freq").strip()
    return {
        "host_processors_per_node": str(len(sockets)),
        "host_processor_model_name": first.get("model name") or platform.machine(),
        "host_processor_core_count": str(count or ""),
        "host_processor_vcpu_count": str(len(blocks) // len(sockets)),
        "host_processor_frequency": f"{int(top) / 1e6:.2f} GHz (max)" if top.isdigit() else "",
        "host_processor_caches": ", ".join(filter(None, map(_cache, sorted(cpu.glob("cache/i*"))))),
    }


def _pairs(block: str) -> dict[str, str]:
    """{name: value} of lines `name : value`."""
    parts = (line.partition(":") for line in block.splitlines())
    return {name.strip(): value.strip() for name, _, value in parts}


def _cache(folder: Path) -> str:
    level, kind, size = (_read(folder / name).strip() for name in ("level", "type", "size"))
    letter = {"Data": "d", "Instruction": "i"}.get(kind, "")
    return f"L{level}{letter} {size}" if level and size else ""


def _memory_and_disks(root: Path) -> dict[str, str]:
    kilobytes = re.search(r"MemTotal:\s*(\d+)", _read(root / "proc/meminfo"))
    disks = {
        folder.name: 512 * int(_read(folder / "size").strip() or 0)
        for folder in sorted((root / "sys/block").glob("*"))
        if re.match(r"nvme|sd|vd", folder.name)
    }
    kinds = {"NVMe SSD" if name.startswith("nvme") else "disk" for name in disks}
    return {
        "host_memory_capacity": f"{int(kilobytes[1]) / 2**20:.0f} GiB" if kilobytes else "",
        "host_storage_type": " and ".join(sorted(kinds)) if kinds != {"disk"} else "",
        "host_storage_capacity": f"{sum(disks.values()) / 1e12:.2f} TB" if disks else "",
    }


def _network(root: Path) -> str:
    """Ports of InfiniBand and RoCE with their rates, else network cards with theirs."""
    ports = [_read(path).strip() for path in (root / "sys/class/infiniband").glob("*/ports/*/rate")]
    if not ports:
        speeds = [_read(p).strip() for p in (root / "sys/class/net").glob("*/speed")]
        ports = [f"{int(s) / 1000:g} Gb/s Ethernet" for s in speeds if s.isdigit() and int(s) > 0]
    return ", ".join(f"{ports.count(port)}x {port}" for port in sorted(set(ports)) if port)


def _accelerators() -> dict[str, str]:
    """Of torch and the driver; N/A in each field where there is no GPU."""
    count = torch.cuda.device_count()
    if not count:
        names = [name for name in FIELDS if name.startswith("accelerator_")]
        return {"accelerators_per_node": "0", **dict.fromkeys(names, "N/A")}
    card = torch.cuda.get_device_properties(0)
    clock, generation, width = _driver("clocks.max.sm,pcie.link.gen.max,pcie.link.width.max")
    return {
        "accelerators_per_node": str(count),
        "accelerator_model_name": card.name,
        "accelerator_host_interconnect": f"PCIe Gen{generation} x{width}" if width else "",
        "accelerator_frequency": f"{clock} (max)" if clock else "",
        "accelerator_on-chip_memories": f"L2 {card.L2_cache_size / 2**20:.0f} MiB",
        "accelerator_memory_capacity": f"{card.total_memory / 2**30:.0f} GiB",
    }


def _driver(query: str) -> list[str]:
    """The first GPU's answers to a query of nvidia-smi; "" for each where it does not answer."""
    empty = [""] * len(query.split(","))
    if shutil.which("nvidia-smi") is None:
        return empty
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    answers = [part.strip() for part in (done.stdout.splitlines() or [""])[0].split(",")]
    return answers if done.returncode == 0 and len(answers) == len(empty) else empty


def _software(root: Path) -> dict[str, str]:
    stack = [f"Python {platform.python_version()}"]
    for package in ("triton", "transformer-engine", "apex", "mlperf-logging"):
        try:
            stack.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        (driver,) = _driver("driver_version")
        cudnn = torch.backends.cudnn.version()
        stack += [f"CUDA {torch.version.cuda}", f"cuDNN {cudnn}", f"NCCL {nccl}"]
        stack += [f"driver {driver}"] if driver else []
    name = re.search(r'^PRETTY_NAME="?([^"\n]+)', _read(root / "etc/os-release"), re.MULTILINE)
    return {
        "framework": f"PyTorch {torch.__version__}",
        "other_software_stack": ", ".join(stack),
        "operating_system": name[1] if name else platform.platform(),
    }


def _read(path: Path) -> str:
    """The text of a file of the system; "" where there is none, or it gives none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
