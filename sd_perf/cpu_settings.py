"""How OpenMP's threads wait and what glibc keeps: both are read once, so this comes before torch.

What a user's environment names stays as it is there.
"""

from __future__ import annotations

import ctypes
import os
import sys

_SPIN_COUNT = 20_000
"""Threads that wait for each other spin for microseconds, then sleep. Where another process has the
core, spinning for longer makes two threads many times slower than one."""
_MMAP_THRESHOLD = 32 << 20
_TRIM_THRESHOLD = 1 << 30
"""glibc returns freed memory to the system and faults it in again in every training step, which is
a tenth of the step on a CPU. It keeps up to a gigabyte instead."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""parameters of mallopt(3)"""


def settle_cpu() -> None:
    """Set them for this process, and for those that it starts by its environment."""
    os.environ.setdefault("GOMP_SPINCOUNT", str(_SPIN_COUNT))
    for name, parameter, size in (
        ("MALLOC_MMAP_THRESHOLD_", _M_MMAP_THRESHOLD, _MMAP_THRESHOLD),
        ("MALLOC_TRIM_THRESHOLD_", _M_TRIM_THRESHOLD, _TRIM_THRESHOLD),
    ):
        if name in os.environ:
            continue
        os.environ[name] = str(size)
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
            libc.mallopt(parameter, size)
