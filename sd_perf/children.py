"""Child processes that end with the process that started them, however that ends.

`python -m sd_perf.children PARENT MODULE ARGUMENTS` runs a module as such a child.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context, resource_tracker
from typing import Any

from sd_perf.stopping import STOP_SIGNALS

_PR_SET_PDEATHSIG = 1
"""option of prctl(2): the signal that this process gets when its parent dies"""
_SECONDS_TO_END = 60
"""for a child to save and clean up after SIGTERM, before it is killed"""


def end_with_parent(parent: int) -> None:
    """Have the system kill this process when its parent dies, even by kill -9 (on Linux).

    `parent` is the parent's process id.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)


def end_with_torchrun() -> None:
    """Where torchrun started this process, have it end with torchrun, even by kill -9 (on Linux).

    A rank that outlives its launcher trains on unseen, and keeps its run folder locked.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(os.getppid())


@contextlib.contextmanager
def child(module: str, *arguments: str, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Run a module in a process of its own that ends with the block at the latest.

    It is asked to end by SIGTERM. `options` are those of subprocess.Popen.
    """
    command = [sys.executable, "-m", "sd_perf.children", str(os.getpid()), module, *arguments]
    process = subprocess.Popen(command, **options)
    try:
        yield process
    finally:
        process.terminate()  # without effect where it has ended
        try:
            process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def worker_pool(processes: int) -> Iterator[ProcessPoolExecutor]:
    """A pool of worker processes. Signals to stop are left to this process, which ends the pool.

    They are spawned, because forking a process that may hold CUDA or threads is not safe.
    """
    pool = ProcessPoolExecutor(
        processes, get_context("spawn"), initializer=end_with_parent, initargs=(os.getpid(),)
    )
    # Workers inherit the blocked signals. The tracker would unblock two of them when it starts.
    resource_tracker.ensure_running()
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        pool.submit(int)  # starts them all
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    end_with_parent(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
