"""`python -m sd_perf.cluster.bound ARGUMENTS`: `sd-perf ARGUMENTS` near the GPU of this process.

The process is bound to the processors of its GPU's NUMA node, where the machine tells it; memory
follows, since Linux takes it where it is first touched. It ends with the launcher that started it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from sd_perf.children import end_with_parent

PCI = Path("/sys/bus/pci/devices")


def main() -> None:
    """Bind this process, and become `sd-perf`."""
    end_with_parent(os.getppid())
    local_rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    here = os.sched_getaffinity(0)
    cpus = near_cpus(int(local_rank), gpu_addresses()) if local_rank.isdigit() else set()
    if cpus & here and cpus & here != here:
        os.sched_setaffinity(0, cpus & here)
        told = f"{len(cpus & here)} of {len(here)} processors, those near its GPU"
        print(f"local rank {local_rank}: bound to {told}", file=sys.stderr, flush=True)
    os.execv(sys.executable, [sys.executable, "-m", "sd_perf", *sys.argv[1:]])


def gpu_addresses() -> list[str]:
    """PCI addresses of the GPUs that this process sees, in torch's order; empty without any.

    The order is that of CUDA_VISIBLE_DEVICES, else nvidia-smi's, which is that of the bus.
    """
    query = ["nvidia-smi", "--query-gpu=index,uuid,pci.bus_id", "--format=csv,noheader"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [re.split(r",\s*", line.strip()) for line in lines.splitlines()]
    gpus = [row for row in rows if len(row) == 3]
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return [address for _, _, address in gpus]
    named = {key: address for index, uuid, address in gpus for key in (index, uuid)}
    return [named[key] for key in chosen.split(",") if key in named]


def near_cpus(local_rank: int, addresses: list[str], pci: Path = PCI) -> set[int]:
    """The processors of the NUMA node that a rank's GPU hangs on; empty where nothing tells it.

    `addresses` are of all GPUs that the process sees: its own alone, or those of all local ranks.
    """
    if not addresses or local_rank >= len(addresses) > 1:
        return set()
    address = addresses[local_rank if len(addresses) > 1 else 0].lower()
    device = pci / re.sub(r"^0000(?=[0-9a-f]{4}:)", "", address)  # nvidia-smi has 8 digits
    try:
        node = int((device / "numa_node").read_text())
        return parse_cpus((device / "local_cpulist").read_text()) if node >= 0 else set()
    except (OSError, ValueError):
        return set()


def parse_cpus(text: str) -> set[int]:
    """The kernel's list of processors: "0-2,8" -> {0, 1, 2, 8}."""
    ranges = [part.partition("-") for part in text.strip().split(",") if part]
    return {cpu for low, _, high in ranges for cpu in range(int(low), int(high or low) + 1)}


if __name__ == "__main__":
    main()
