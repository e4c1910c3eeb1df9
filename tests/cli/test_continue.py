"""The command that a stopped run prints, executed as it stands."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from sd_perf.training import launch
from sd_perf.training.callbacks.base import Callback
from tests.cli.bad_input import matches, newest


class StopAtFirstStep(Callback):
    def on_step(self, trainer) -> None:
        trainer.stop_reason = "SIGTERM"


def stopped(sd_perf, monkeypatch, *options: object) -> str:
    """Train one step; returns the command that is printed then."""
    words = ["train", *map(str, options), "--fresh", "--logging.every-steps", "1"]
    callbacks = launch.default_callbacks
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["sd-perf", *words])
        patch.setattr(
            launch, "default_callbacks", lambda *given: [StopAtFirstStep(), *callbacks(*given)]
        )
        code, output, _ = sd_perf(*words)
    *_, told, command = output.splitlines()
    assert code == 75 and told == "stopped by SIGTERM and saved; continue with:"
    return command


@pytest.mark.slow
def test_the_printed_command_in_a_shell(preset, tmp_path, sd_perf, monkeypatch):
    """Overrides are kept, names are quoted, and --fresh has become --resume."""
    run = tmp_path / "it's a $(touch pwned) run\n`touch pwned`"
    command = stopped(
        sd_perf, monkeypatch, "--config", preset, "--run.dir", run, "--training.max-samples", 12
    )
    assert "--fresh" not in command
    program = tmp_path / "bin" / "sd-perf"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m sd_perf "$@"\n')
    program.chmod(0o755)
    path = f"{program.parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=tmp_path,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    matches(done.stdout, "resuming at sample 4 of 12")
    assert newest(run).name == "samples_0000000012"
    assert not (tmp_path / "pwned").exists()


def test_an_unfinished_run_is_found_by_the_dry_run(preset, run, sd_perf, refused, monkeypatch):
    """`make train` asks before it spends a minute on parity."""
    command = ["--config", preset, "--run.dir", run]
    stopped(sd_perf, monkeypatch, *command)
    dry = ["train", *command, "--dry-run"]
    matches(refused(*dry, "--fresh"), "holds an unfinished run (4 of 8 samples)", "--resume")
    matches(refused(*dry, "--resume", "--model.num-res-blocks", 2), "model.num_res_blocks")
    assert sd_perf(*dry, "--resume")[0] == 0
    assert sd_perf(*dry)[0] == 0
    assert newest(run).name == "samples_0000000004"
