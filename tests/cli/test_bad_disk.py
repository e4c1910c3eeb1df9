"""Disks that are full, read-only or in the way: one sentence, and what was saved stays."""

from __future__ import annotations

import subprocess

import pytest

from sd_perf.runs.checkpoints import load_component
from tests.cli.bad_input import (
    TEXT_TINY,
    command_on,
    fail,
    matches,
    newest,
    saved,
    write_preset,
)


def test_results_folder_below_a_file(preset, tmp_path, whole_run, refused):
    (tmp_path / "file").write_text("kept")
    sentence = refused("train", "--config", preset, "--run.dir", tmp_path / "file" / "run")
    matches(sentence, "file/run cannot be written (Not a directory)", "choose another --run.dir")
    sentence = refused(*command_on(whole_run, "export", preset, tmp_path / "file"))
    matches(
        sentence, "file/unet.safetensors cannot be written (File exists)", "choose another path"
    )
    assert (tmp_path / "file").read_text() == "kept"


def test_read_only_disk(mount_tmpfs, preset, whole_run, refused):
    disk = mount_tmpfs("ro")
    sentence = refused("train", "--config", preset, "--run.dir", disk / "run")
    matches(sentence, disk / "run", "cannot be written (Read-only file system)", "--run.dir")
    matches(refused(*command_on(whole_run, "export", preset, disk)), "cannot be written")


REAL = [pytest.param(number, marks=pytest.mark.slow) for number in (1, 2)]


@pytest.mark.parametrize("processes", [0, *REAL])
def test_disk_full_in_a_checkpoint(processes, mount_tmpfs, preset, sd_perf, refused):
    """The first of two checkpoints fits. The run stops, keeps it, and goes on once there is
    space."""
    disk = mount_tmpfs("size=20m")
    if processes:
        sentence = fail(preset, disk / "run", processes=processes)
    else:
        sentence = refused("train", "--config", preset, "--run.dir", disk / "run")
    matches(
        sentence,
        "a checkpoint could not be written (",
        "newest complete",
        "samples_0000000004",
        "make room",
    )
    assert [path.name for path in (disk / "run" / "checkpoints").iterdir()] == [
        "samples_0000000004"
    ]
    assert load_component(newest(disk / "run"), "model")
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
    code, output, _ = sd_perf("train", "--config", preset, "--run.dir", disk / "run", "--resume")
    assert code == 0 and "resuming at sample 4 of 8" in output
    assert newest(disk / "run").name == "samples_0000000008"


def test_disk_full_in_the_metrics(mount_tmpfs, preset, refused):
    run = mount_tmpfs("size=12k") / "run"
    options = [
        "--training.max-samples",
        2000,
        "--checkpoint.every-samples",
        2000,
        "--logging.every-steps",
        1,
    ]
    sentence = refused("train", "--config", preset, "--run.dir", run, *options)
    matches(
        sentence,
        run / "metrics.jsonl",
        "cannot be written (No space left on device)",
        "make room",
        "--resume",
    )


def test_pictures_are_not_overwritten(tmp_path, run, refused, sd_perf, monkeypatch):
    """The autoencoder alone is made up. The second time is refused before anything is drawn."""
    monkeypatch.setattr(
        "sd_perf.evaluation.draw.read_decoder", lambda *given: lambda latents: latents[:, :3].tanh()
    )
    text = {"text_encoder": {"model": TEXT_TINY, "weights": "random"}, "sampling": {"steps": 2}}
    preset = write_preset(tmp_path / "text.yaml", **text, model={"context_dim": 128})
    assert sd_perf("train", "--config", preset, "--run.dir", run)[0] == 0
    command = command_on(run, "sample", preset, tmp_path / "pictures")
    code, output, _ = sd_perf(*command)
    assert code == 0 and output.split() == [str(path) for path in (tmp_path / "pictures").iterdir()]
    before = saved(tmp_path / "pictures")
    matches(refused(*command), "0000_a_cat.png: exists already", "choose another --output")
    assert saved(tmp_path / "pictures") == before
    matches(refused(*command, "--prompt"), "--prompt: give one or more prompts")
