"""Memory that a device has, and the sentence where a run needs more."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from sd_perf.errors import UserError

_MEMINFO = Path("/proc/meminfo")
_STATM = Path("/proc/self/statm")
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def require_memory(needed: int, device: torch.device, what: str, remedy: str) -> None:
    """UserError where `what` needs more bytes than the device has, before it is tried.

    `needed` is a lower bound. So nothing that fits is refused; what is slightly too large is left
    to the allocator.
    """
    available = available_bytes(device)
    if available is not None and needed > available:
        raise UserError(
            f"{what} needs at least {_gib(needed)} of memory on {device.type}, and "
            f"{_gib(available)} are available; {remedy}"
        )


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can be allocated on a device; None where the system does not say.

    On a CPU: memory that is free or can be freed, and swap, but no more than the limit of the
    control group (a container's).
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = (line.split() for line in _MEMINFO.read_text().splitlines())
        kib = {words[0].rstrip(":"): int(words[1]) for words in lines}
        free = 1024 * (kib["MemAvailable"] + kib["SwapFree"])
    except (OSError, KeyError, ValueError):  # no Linux
        return None
    try:
        return min(free, int(_CGROUP_LIMIT.read_text()))
    except (OSError, ValueError):  # no control group, or "max": no limit
        return free


def held_bytes(device: torch.device) -> int:
    """Bytes of a device that this process holds, and could use otherwise."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved()
    try:
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no Linux
        return 0


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
