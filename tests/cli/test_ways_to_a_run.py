"""Every command that takes a run takes it by any name: a link, a bare name, a dot."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sd_perf.models.weight_files import UNET_PREFIX
from sd_perf.runs.checkpoints import load_component
from sd_perf.runs.parity_record import record_folder
from tests.cli.bad_input import AUTOENCODER, matches, newest, saved
from tests.small_run import small_config

RUN = "run"
CHECKPOINT = "run/checkpoints/samples_0000000008"
WAYS_TO_A_RUN = {
    "link": (".", "link"),
    "bare name": (".", RUN),
    "dot": (RUN, "."),
    "dots": ("run/checkpoints", ".."),
}
"""folder in which a command is called, and what it is given"""
WAYS_TO_A_CHECKPOINT = {
    "link": (".", "best"),
    "in its run": (RUN, "checkpoints/samples_0000000008"),
    "bare name": ("run/checkpoints", "samples_0000000008"),
    "dot": (CHECKPOINT, "."),
    "kept elsewhere": (".", "run/checkpoints/samples_0000000008"),
}


@pytest.fixture
def here(copied_run, tmp_path, monkeypatch):
    """here(folder below tmp_path): makes it the current one, beside a run and links to it."""
    (tmp_path / "link").symlink_to(RUN)
    (tmp_path / "best").symlink_to(CHECKPOINT)
    return lambda folder: monkeypatch.chdir(tmp_path / folder)


@pytest.mark.parametrize("way", WAYS_TO_A_RUN)
def test_commands_on_a_run(way, here, tmp_path, preset, copied_run, sd_perf, refused):
    folder, name = WAYS_TO_A_RUN[way]
    here(folder)
    before = saved(copied_run)
    assert sd_perf("verify", name)[0] == 0
    assert sd_perf("convert-checkpoints", name)[0] == 0
    assert sd_perf("export", "--source", name, "--output", tmp_path / "unet.safetensors")[0] == 0
    code, output, _ = sd_perf("train", "--config", preset, "--run.dir", name, "--resume")
    assert code == 0 and "the run is complete (8 samples)" in output
    # These go as far as a run of synthetic data lets them.
    matches(refused("evaluate", name), "evaluation.prompts")
    matches(refused("mlperf", "check", name), "no such MLPerf log")
    draw = ("--autoencoder", AUTOENCODER, "--output", tmp_path / "out", "--prompt", "a cat")
    matches(refused("sample", "--source", name, *draw), "text_encoder")
    assert saved(copied_run) == before
    assert sd_perf("report", name)[0] == 0
    assert (copied_run / "report.html").is_file()


@pytest.mark.parametrize("way", WAYS_TO_A_CHECKPOINT)
def test_commands_on_a_checkpoint(way, here, tmp_path, copied_run, sd_perf):
    folder, name = WAYS_TO_A_CHECKPOINT[way]
    if way == "kept elsewhere":
        path = newest(copied_run)
        path.rename(tmp_path / "archived")
        path.symlink_to(tmp_path / "archived")
    here(folder)
    output = tmp_path / "unet.safetensors"
    assert sd_perf("export", "--source", name, "--output", output)[0] == 0
    exported = load_file(output)
    for key, tensor in load_component(newest(copied_run), "model").items():
        assert torch.equal(exported[UNET_PREFIX + key], tensor)


@pytest.mark.parametrize(("name", "record"), [(".", "run.parity"), ("..", "{}.parity")])
def test_the_parity_record_of_a_run_named_by_dots(name, record, copied_run, monkeypatch):
    """It lies beside the run, not in it."""
    monkeypatch.chdir(copied_run)
    place = Path(record.format(copied_run.parent.name))
    beside = copied_run.parent if name == "." else copied_run.parent.parent
    assert record_folder(small_config(Path(name))) == beside / place
