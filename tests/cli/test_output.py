"""Output that cannot be written is told once, and ends nothing."""

from __future__ import annotations

import os
import sys

import pytest

from sd_perf.cli import main
from tests.cli.bad_input import newest


@pytest.fixture(params=["full", "closed pipe"])
def lost_stdout(request):
    """A stream on a full device, or on a pipe that nobody reads."""
    if request.param == "full":
        writer = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, writer = os.pipe()
        os.close(reader)
    return os.fdopen(writer, "w")


@pytest.mark.parametrize(
    ("command", "code"), [(["train", "--config", "tiny.yaml"], 0), (["doctor", "--json"], 1)]
)
def test_the_command_goes_on(command, code, lost_stdout, preset, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdout", lost_stdout)
    with pytest.raises(SystemExit) as left:
        main(command)
    assert left.value.code == code and sys.stdout is lost_stdout
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("sd-perf: stdout cannot be written (")
    assert line.endswith("); the command goes on, its output is lost")
    if command[0] == "train":
        assert newest(tmp_path / "runs/default").name == "samples_0000000008"
