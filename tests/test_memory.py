"""What cannot be allocated is said before it is tried."""

from __future__ import annotations

import re

import pytest
import torch

from sd_perf import memory
from sd_perf.errors import UserError
from sd_perf.memory import available_bytes, require_memory

CPU = torch.device("cpu")


def test_available(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "_CGROUP_LIMIT", tmp_path / "memory.max")
    assert available_bytes(CPU) is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 5 kB\nSwapFree: 2 kB\n")
    assert available_bytes(CPU) == 7 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(CPU) == 7 * 1024
    (tmp_path / "memory.max").write_text("1024\n")
    assert available_bytes(CPU) == 1024


def test_sentence(monkeypatch):
    monkeypatch.setattr(memory, "available_bytes", lambda device: 2**30)
    require_memory(2**30, CPU, "x", "y")
    right = "drawing needs at least 1.5 GiB of memory on cpu, and 1.0 GiB are available; draw fewer"
    with pytest.raises(UserError, match=f"^{re.escape(right)}$"):
        require_memory(3 * 2**29, CPU, "drawing", "draw fewer")
    monkeypatch.setattr(memory, "available_bytes", lambda device: None)
    require_memory(2**80, CPU, "x", "y")
