"""Child processes end with their parent, even where that is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sd_perf.children import child, worker_pool
from tests.waiting import wait_for

PARENT = """
import contextlib, sys, time
from sd_perf.children import child, worker_pool
if __name__ == "__main__":
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(worker_pool(2))
        pool.submit(int).result()
        process = stack.enter_context(child("sleeper", "ready"))
        print(process.pid, *pool._processes, flush=True)
        time.sleep(600)
"""
LAUNCHER = """
import os, subprocess, sys
from sd_perf.cluster.commands import run
rank = {**os.environ, "TORCHELASTIC_RUN_ID": "as torchrun sets it"}
subprocess.Popen([sys.executable, "sleeper.py", "rank"], env=rank)
run([sys.executable, "sleeper.py", "run"])
"""
SLEEPER = """
import os, sys, time
from sd_perf.children import end_with_torchrun
end_with_torchrun()
print(*sys.argv[1:], *([] if sys.argv[1] == "ready" else [os.getpid()]), flush=True)
time.sleep(600)
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the modules of this file."""
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def is_alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="the system call is Linux's")
@pytest.mark.parametrize(
    ("script", "said", "count"), [("parent.py", {"ready"}, 3), ("launcher.py", {"rank", "run"}, 2)]
)
def test_children_end_with_a_killed_parent(script, said, count, here):
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    with parent:
        words = "".join(parent.stdout.readline() for _ in range(2)).split()
        assert said < set(words)
        children = [int(word) for word in words if word.isdigit()]
        assert len(children) == count and all(map(is_alive, children))
        parent.kill()
        wait_for(lambda: not any(map(is_alive, children)))


def test_a_child_ends_with_its_block(here):
    with child("sleeper", "ready", stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
    assert process.returncode == -signal.SIGTERM


def test_a_worker_leaves_signals_to_its_parent():
    with worker_pool(1) as pool:
        blocked = pool.submit(signal.pthread_sigmask, signal.SIG_BLOCK, []).result()
    assert {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1} <= blocked
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_child_whose_parent_has_died_already(here):
    command = [sys.executable, "-m", "sd_perf.children", str(os.getpid() + 1), "sleeper"]
    assert subprocess.run(command).returncode == -signal.SIGKILL
