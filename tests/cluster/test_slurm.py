"""Slurm's answers, read."""

from __future__ import annotations

from pathlib import Path

import pytest

from sd_perf.cluster import slurm
from sd_perf.errors import UserError


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 1800), ("2:30", 150), ("04:00:00", 14400), ("1-12", 129600), ("1-00:30", 88200)],
)
def test_time_limits(text, seconds):
    assert slurm.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "1h", "-5", "1:2:3:4", "٣"])
def test_no_time_limits(text):
    with pytest.raises(UserError, match="--walltime"):
        slurm.seconds_of(text)


def test_nodes(fake_slurm):
    fake_slurm(gpus=(8, 0), host="machine")
    first, second = slurm.nodes()
    assert first == slurm.Node("n1", "10.0.0.1", "machine", 8, ("main", "all"))
    assert second.gpus == 0 and slurm.default_partition() == "main"
    assert slurm.address("n1") == "10.0.0.1"


def test_apptainer(fake_slurm, tmp_path):
    fake_slurm()
    program = tmp_path / "bin/apptainer"
    program.touch(mode=0o755)
    options, prefix = slurm.in_container("image.sif", "/data:/datasets", Path("/here"))
    assert options == []
    binds = "--bind /here:/here --bind /data:/datasets"
    assert " ".join(prefix) == f"apptainer exec --nv {binds} --pwd /here image.sif"
