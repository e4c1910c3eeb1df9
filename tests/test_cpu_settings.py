"""What is settled before torch is imported: freed memory is kept, threads don't spin for long."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import mmap, os, resource, sys
from sd_perf.cpu_settings import settle_cpu
if sys.argv[1] == "settled":
    settle_cpu()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(9):
    blocks = [bytearray(8 << 20) for _ in range(16)]
    del blocks
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults, os.environ.get("GOMP_SPINCOUNT"), os.environ.get("MALLOC_TRIM_THRESHOLD_"))
"""


def run(word: str, **environment: str) -> list[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("GOMP", "MALLOC"))}
    command = [sys.executable, "-c", PROGRAM, word]
    done = subprocess.run(command, env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_not_faulted_in_again() -> None:
    assert int(run("settled")[0]) < int(run("not")[0]) / 4


def test_the_users_own_settings_stay() -> None:
    _, spin, trim = run("settled", GOMP_SPINCOUNT="7", MALLOC_TRIM_THRESHOLD_="8")
    assert (spin, trim) == ("7", "8")


def test_torch_is_imported_after_them() -> None:
    program = """
import os, sys
def watch(event, args):
    if event == "import" and args[0] == "torch":
        print("settled" if "GOMP_SPINCOUNT" in os.environ else "too late")
sys.addaudithook(watch)
import sd_perf.cli
try:
    sd_perf.cli.main(["completion", "bash"])
except SystemExit:
    import torch

"""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("GOMP", "MALLOC"))}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=kept, capture_output=True, text=True)
    assert "settled" in done.stdout and "too late" not in done.stdout, done.stderr
