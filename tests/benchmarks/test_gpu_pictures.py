"""DALI's pictures in the acceptance run: on a CPU, where all is green, and with faults put in."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_parts, gpu_pictures
from benchmarks.gpu_device import Rehearsal
from benchmarks.gpu_parts import Job
from benchmarks.gpu_report import nothing_yet
from benchmarks.timing import Budget
from sd_perf.data.loaders import dali

SIZES = "cpu", Rehearsal.full.latent_size


def red(checks: list) -> list[str]:
    return [check["check"].removeprefix("pictures: ") for check in checks if not check["passed"]]


@pytest.fixture
def has_dali() -> None:
    pytest.importorskip("nvidia.dali", reason="needs NVIDIA DALI: pip install 'sd-perf[dali]'")


@pytest.mark.slow
def test_all_is_green_on_a_cpu(has_dali):
    groups = gpu_pictures.groups(Rehearsal())
    checks = [check for group in groups for check in group.run()]
    assert len(groups) == 3 and len(checks) == 6 and red(checks) == []
    rates = gpu_pictures.measure_rates(Rehearsal())
    assert {"DALI, 1 threads", "portable, 1 threads"} <= set(rates) and min(rates.values()) > 0


@pytest.mark.slow
def test_a_crop_that_is_off_by_one_is_red(has_dali, monkeypatch):
    geometry = dali.geometry

    def shifted(shape, size, crop):
        sides, corner = geometry(shape, size, crop)
        return sides, tuple(max(place - 1, 0) for place in corner)

    monkeypatch.setattr(dali, "geometry", shifted)
    assert red(gpu_pictures.check_pixels(*SIZES)) == ["pixels"]


@pytest.mark.slow
def test_memory_that_is_used_anew_is_red(has_dali, monkeypatch):
    shared, pixels_of = torch.empty(6, 3, 64, 64), dali.DaliLoader._pixels
    monkeypatch.setattr(
        dali.DaliLoader, "_pixels", lambda *arguments: shared.copy_(pixels_of(*arguments))
    )
    assert red(gpu_pictures.check_hand_over(*SIZES)) == ["pixels read late"]


@pytest.mark.slow
def test_a_decoder_that_takes_half_a_picture_is_red(has_dali, monkeypatch):
    monkeypatch.setattr(
        dali.DaliLoader,
        "_decode",
        lambda self, pictures, stream: torch.zeros(len(pictures), 3, self._side, self._side),
    )
    assert red(gpu_pictures.check_bad_pictures(*SIZES)) == ["a picture that is cut in half"]


def test_without_dali_the_part_says_so(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    options = gpu_parts.parse(["pictures", "--findings", str(tmp_path / "f.json"), "--rehearse"])
    job = Job(Rehearsal(), Budget(10.0), options, nothing_yet("pictures"))
    assert gpu_parts.run_items(job, gpu_parts.pictures(job), item_most=10.0) == 0
    assert job.findings["status"] == "done" and job.findings["checks"] == []
    assert "pip install 'sd-perf[dali]'" in job.findings["facts"]["absent"]
