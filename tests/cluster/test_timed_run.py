"""run_and_time.sh: its plan, its lines, its exit code."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sd_perf.cluster import timed_run
from sd_perf.cluster.commands import Training, run
from sd_perf.cluster.timed_run import Plan, TimedRun, make_plan, run_and_time
from sd_perf.distributed.launcher import Place
from tests.waiting import PATIENCE

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "run_and_time.sh"


def script(*options: object, code: int = 0, **variables: object) -> str:
    """run_and_time.sh's output."""
    environment = {**os.environ, "PYTHON": sys.executable}
    environment |= {name: str(value) for name, value in variables.items()}
    done = subprocess.run(
        [SCRIPT, *map(str, options)], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_the_dry_run_prints_the_commands(preset, tmp_path):
    output = script("--dry-run", "--results-dir", tmp_path, CONFIG=preset, GPUS_PER_NODE=3)
    [_, command] = output.splitlines()[:2]
    words = shlex.split(command)
    assert words[1:3] == ["-m", "sd_perf.cluster.torchrun"] and "--max-restarts" in words
    assert words[words.index("--nproc-per-node") + 1] == "3"
    assert words[words.index("--config") + 1] == str(preset)
    assert re.search(r"/\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d_tiny$", words[words.index("--run.dir") + 1])
    assert not list(tmp_path.glob("*_tiny"))


def test_an_option_wins_over_a_variable(preset, tmp_path):
    output = script("--dry-run", "--gpus-per-node", 2, CONFIG=preset, GPUS_PER_NODE=3)
    assert "--nproc-per-node 2" in output


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"checkpoint": "/no/sd.ckpt"}, "--checkpoint: /no/sd.ckpt: no such file"),
        ({"num_nodes": 2}, "NODE_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"config": Path("no.yaml")}, "no.yaml: no such config file"),
    ],
)
def test_what_cannot_be(options, told, preset, tmp_path, monkeypatch):
    for name in ("NODE_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Exception, match=re.escape(told)):
        make_plan(TimedRun(**{"config": preset, "results_dir": tmp_path, **options}))


def test_more_processes_than_gpus(preset, monkeypatch):
    monkeypatch.setattr(timed_run, "gpu_addresses", lambda: ["a", "b"])
    with pytest.raises(Exception, match="--gpus-per-node: 3 cannot be used; this machine has 2"):
        make_plan(TimedRun(config=preset, gpus_per_node=3))


def plan(tmp_path: Path, program: str) -> Plan:
    launcher = [sys.executable, "-c", program]
    training = Training(tmp_path / "tiny.yaml", tmp_path / "run")
    return Plan(training, launcher, False, [], "here")


def test_the_lines_of_the_benchmark(tmp_path, capfd, monkeypatch):
    moments = iter([1e9, 1e9 + 4242.4])
    monkeypatch.setattr(timed_run, "time", SimpleNamespace(time=lambda: next(moments)))
    assert run_and_time(plan(tmp_path, "")) == 0
    output = capfd.readouterr().out
    moment = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [AP]M"
    assert re.search(rf"^STARTING TIMING RUN AT {moment}$", output, re.M)
    assert re.search(rf"^ENDING TIMING RUN AT {moment}$", output, re.M)
    assert re.search(rf"^RESULT,stable_diffusion,4242,\w+,{moment}$", output, re.M)
    assert "file caches kept (not asked)" in output


def test_a_complete_run_has_no_second_result(tmp_path, capfd):
    newest = tmp_path / "run/checkpoints/samples_0000000200"
    program = f"import os; os.makedirs({str(newest)!r}, exist_ok=True)"
    outputs = []
    for _ in range(2):
        assert run_and_time(plan(tmp_path, program)) == 0
        outputs.append(capfd.readouterr().out)
    assert ["RESULT," in output for output in outputs] == [True, False]
    assert ["nothing was left to train" in output for output in outputs] == [False, True]


def test_75_stays_75(tmp_path, capfd):
    assert run_and_time(plan(tmp_path, "raise SystemExit(75)")) == 75
    output = capfd.readouterr().out
    assert "exit code 75; run_and_time.sh --run-dir" in output and "RESULT" not in output


def test_a_resumed_run_counts_from_its_first_start_and_says_the_same_of_caches(tmp_path):
    manifest = {
        "config": {"mlperf": {"caches_cleared": True}},
        "starts": [{"time": "2024-05-01T12:00:00+00:00"}],
    }
    (tmp_path / "run_manifest.json").write_text(json.dumps(manifest))
    assert timed_run.first_start(tmp_path, 2e9) == 1714564800
    assert timed_run.recorded_clearing(tmp_path) is True
    assert timed_run.recorded_clearing(tmp_path / "none") is None


def test_caches(tmp_path, monkeypatch):
    file = tmp_path / "drop_caches"
    file.touch()
    monkeypatch.setattr(timed_run, "DROP_CACHES", file)
    monkeypatch.setattr(os, "sync", lambda: None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert timed_run.drop_caches() == (True, "as root") and file.read_text() == "3\n"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("PATH", "/nowhere")
    dropped, why = timed_run.drop_caches()
    assert not dropped and why.startswith("not root, and sudo")


def test_signals_are_handed_on():
    program = """
import os, signal, time
signal.signal(signal.SIGUSR1, lambda *_: os._exit(75))
os.kill(os.getppid(), signal.SIGUSR1)
time.sleep(300)
"""
    before = signal.getsignal(signal.SIGUSR1)
    assert run([sys.executable, "-c", program]) == 75
    assert signal.getsignal(signal.SIGUSR1) is before
    assert run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == 137


@pytest.mark.slow
def test_two_processes_on_a_machine_without_a_gpu(preset, tmp_path):
    """The whole way, and a signal: the run is saved, ends with 75, and is continued to its end."""
    output = script("--config", preset, "--run-dir", tmp_path / "run", "--no-clear-caches")
    assert "2 processes, on the CPU" in output and "on cpu x 2" in output
    assert "RESULT,stable_diffusion," in output and "not evaluated" in output
    refused = script("--config", tmp_path / "no.yaml", code=2)
    assert "no such config file" in refused


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGUSR1, 75), (signal.SIGKILL, 76)])
def test_the_exit_code_of_two_processes(number, code, preset, tmp_path):
    """The signal goes to the script; the one that kills goes to a rank."""
    preset.write_text(preset.read_text().replace("max_samples: 200", "max_samples: 4000000"))
    words = ["--config", preset, "--run-dir", tmp_path / "run", "--no-clear-caches"]
    environment = {**os.environ, "PYTHON": sys.executable}
    process = subprocess.Popen(
        [SCRIPT, *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "20/4,000,000 samples" in line:
            break
    target = process.pid
    if number == signal.SIGKILL:
        target = max(ranks_of(tmp_path / "run"))
    os.kill(target, number)
    rest, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, "".join(lines) + rest
    if number == signal.SIGKILL:
        assert re.search(r"rank \d on \S+ \(process \d+\) is gone; ", rest)
        assert "was ended by SIGKILL" in rest
    else:
        assert "stopped by SIGUSR1 and saved" in rest
    assert not ranks_of(tmp_path / "run")


def ranks_of(folder: Path) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"train" in words and str(folder).encode() in words and b"sd_perf" in words:
            found.append(int(process.name))
    return found


def test_nobody_vouches_for_the_caches_of_other_machines(tmp_path, monkeypatch):
    monkeypatch.setattr(timed_run, "drop_caches", lambda: (True, "as root"))
    alone = dataclasses.replace(plan(tmp_path, ""), clear_caches=True)
    assert timed_run.caches_cleared(alone, Place())
    assert not timed_run.caches_cleared(dataclasses.replace(alone, nodes=2), Place())
