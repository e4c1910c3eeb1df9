"""Measurements that may fail without ending the run: other rows are worth having.

`attempt` survives an exception; `run_child` survives also what ends or hangs a whole process, such
as a CUDA error after which every later call in that process fails.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sd_perf.files import one_line


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether GPU memory ran out.

    Looks along the chain of contexts: ending a broken capture raises a second error on top.
    """
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error).lower():
            return True
        error = error.__context__
    return False


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` returns; where it raises, the columns `status` and `reason`.

    The status is `out of memory`, which is a finding, or else `failed`.
    """
    try:
        return measure()
    except Exception as error:  # whatever it is: it must not cost the other rows
        return {
            "status": "out of memory" if is_out_of_memory(error) else "failed",
            "reason": one_line(error),
        }


def release_memory() -> dict[str, Any]:
    """Give unused GPU memory back to the driver. Returns no columns: made for `attempt`."""
    gc.collect()
    torch.cuda.empty_cache()  # does nothing before CUDA is initialised
    return {}


TICK_SECONDS = 0.5
"""time between two looks at a running child"""
ENDING_SECONDS = 10.0
"""time that a killed child has to end; one that the driver holds may take for ever"""


class Ended(NamedTuple):
    """How a child process ended."""

    status: str
    """`done`, `failed`, or `timed out`"""
    reason: str | None
    """exit code or signal, or the time that was up; None: done"""
    seconds: float
    code: int | None = None
    """exit code; None: killed, or ended by a signal"""


def run_child(
    command: Sequence[str],
    seconds: float,
    *,
    folder: Path,
    environment: Mapping[str, str],
    tick: Callable[[], None],
) -> Ended:
    """Run a command and kill it, with all that it started, after so many seconds.

    It prints where this process prints, and runs in `folder` with this environment. `tick` is
    called about twice a second while it runs, and once after it has ended.
    """
    started = time.monotonic()
    # A group of its own, so that all it starts can be killed; in this session, so that what ends
    # the session ends it, too.
    child = subprocess.Popen(command, cwd=folder, env=dict(environment), process_group=0)
    try:
        while child.poll() is None and time.monotonic() - started < seconds:
            with suppress(subprocess.TimeoutExpired):
                child.wait(min(TICK_SECONDS, seconds))
            tick()
        is_late = child.poll() is None
    finally:
        _kill(child)
    tick()
    took = time.monotonic() - started
    if is_late:
        return Ended("timed out", f"killed after {seconds:.0f} s", took)
    if child.returncode == 0:
        return Ended("done", None, took, 0)
    code = child.returncode
    return Ended("failed", _how(code), took, code if code > 0 else None)


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Kill the child and whatever it has started, and wait for it to end."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        child.wait(ENDING_SECONDS)


def _how(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
