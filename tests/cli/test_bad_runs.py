"""Run folders and checkpoints that cannot be used: exit code 2, and nothing saved is changed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from sd_perf.errors import UserError
from sd_perf.runs.lock import RunLock
from sd_perf.training.trainer import Trainer
from tests.cli.bad_input import (
    command_on,
    cut,
    data_options,
    matches,
    newest,
    saved,
)

MODEL = "model_00000_of_00001.safetensors"


def truncate_tensors(checkpoint: Path, other: Path) -> None:
    cut(checkpoint / MODEL)


def flip_a_bit(checkpoint: Path, other: Path) -> None:
    data = bytearray((checkpoint / MODEL).read_bytes())
    data[-1000] ^= 4
    (checkpoint / MODEL).write_bytes(data)


def truncate_state(checkpoint: Path, other: Path) -> None:
    cut(checkpoint / "state.json")


def another_run(checkpoint: Path, other: Path) -> None:
    shutil.rmtree(checkpoint)
    shutil.copytree(other, checkpoint)


def old_format(checkpoint: Path, other: Path) -> None:
    (checkpoint / ".metadata").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    (checkpoint / "state.json").write_text('{"samples": 8, "steps": 2}')


@pytest.mark.parametrize("command", ["resume", "export", "sample"])
@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (truncate_tensors, [f"{MODEL}: truncated (", "move this checkpoint away"]),
        (flip_a_bit, [f"{MODEL}: damaged (", "move this checkpoint away"]),
        (
            truncate_state,
            ["not a checkpoint of sd-perf (state.json: ", "move this checkpoint away"],
        ),
        (another_run, ["is of another run (", "move this checkpoint away"]),
        (old_format, ["has the old format, which is a pickle", "sd-perf convert-checkpoints"]),
    ],
)
def test_checkpoint(command, spoil, parts, copied_run, preset, tmp_path, other_checkpoint, refused):
    spoil(newest(copied_run), other_checkpoint)
    before = saved(copied_run)
    sentence = refused(*command_on(copied_run, command, preset, tmp_path / "output"))
    matches(sentence, newest(copied_run), *parts)
    assert saved(copied_run) == before and not (tmp_path / "output").exists()


def test_a_damaged_checkpoint_moved_away(copied_run, preset, tmp_path, sd_perf):
    """What the sentence advises works."""
    newest(copied_run).rename(tmp_path / "damaged")
    code, output, _ = sd_perf(*command_on(copied_run, "resume", preset, tmp_path))
    assert code == 0 and "resuming at sample 4 of 12" in output


@pytest.mark.parametrize("command", ["export", "sample"])
@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("absent", ["absent: no such run, checkpoint or weight file", "check the path"]),
        ("folder", ["folder: holds no complete checkpoint", "give a run folder"]),
        ("moved", ["is no run folder (no run_manifest.json)", "sd-perf train"]),
        ("file", ["file: holds no complete checkpoint", "give a run folder"]),
    ],
)
def test_source_is_no_run(command, source, parts, whole_run, preset, tmp_path, refused):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    if source == "moved":  # a checkpoint taken out of its run
        shutil.copytree(newest(whole_run), tmp_path / "moved")
    matches(refused(*command_on(tmp_path / source, command, preset, tmp_path / "output")), *parts)
    assert not (tmp_path / "output").exists()


def test_resume_where_there_is_nothing_yet_begins(preset, run, sd_perf):
    """So that a job that is queued again needs one command."""
    code, output, _ = sd_perf("train", "--config", preset, "--run.dir", run, "--resume")
    assert (
        code == 0 and "no checkpoint to resume from" in output and "starting at sample 0" in output
    )


def test_resume_of_a_complete_run_does_nothing(copied_run, preset, sd_perf):
    """So that a job that is queued again, or `make resume`, goes on to what comes after
    training."""
    before = saved(copied_run)
    code, output, _ = sd_perf("train", "--config", preset, "--run.dir", copied_run, "--resume")
    assert (
        code == 0
        and "the run is complete (8 samples)" in output
        and "larger --training.max-samples" in output
    )
    assert saved(copied_run) == before


def test_a_folder_that_holds_a_run(copied_run, preset, refused):
    before = saved(copied_run)
    command = ["train", "--config", preset, "--run.dir", copied_run]
    matches(
        refused(*command), copied_run, "holds a run already", "--resume", "--fresh", "--run.dir"
    )
    sentence = refused(*command, "--resume", "--model.num-res-blocks", 2)
    matches(
        sentence, f"model.num_res_blocks: the run in {copied_run} has 1, this config 2", "--run.dir"
    )
    (copied_run / "run_manifest.json").rename(copied_run.parent / "manifest")
    matches(refused(*command, "--resume"), "is no run folder (no run_manifest.json)")
    (copied_run.parent / "manifest").rename(copied_run / "run_manifest.json")
    assert saved(copied_run) == before


def test_fresh(copied_run, preset, sd_perf):
    before = saved(copied_run)
    code, output, _ = sd_perf("train", "--config", preset, "--run.dir", copied_run, "--fresh")
    assert code == 0 and "starting at sample 0" in output
    assert f"{copied_run}: the earlier run is now {copied_run}.1" in output.splitlines()
    assert saved(copied_run.with_name("run.1")) == before
    assert newest(copied_run).name == "samples_0000000008"


def test_fresh_moves_nothing_where_the_run_cannot_begin(copied_run, preset, refused):
    refused(
        "train", "--config", preset, "--run.dir", copied_run, "--fresh", *data_options(copied_run)
    )
    assert [path.name for path in copied_run.parent.glob("run*")] == ["run"]


@pytest.mark.parametrize(
    "options", [["train", "--resume"], ["train", "--fresh"], ["evaluate"]], ids=" ".join
)
def test_a_folder_that_another_process_writes_to(options, copied_run, preset, refused, sd_perf):
    """One sentence names it, and nothing is touched: the draft of its checkpoint least of all."""
    draft = copied_run / "checkpoints" / ".writing_samples_0000000012.x"
    draft.mkdir()
    name, *flags = options
    config = ["--config", preset, "--run.dir", copied_run, "--training.max-samples", 12, *flags]
    command = [name, *(config if name == "train" else [copied_run])]
    with RunLock() as lock:
        lock.take(copied_run)
        before = saved(copied_run)
        matches(refused(*command), copied_run, "is in use by", f"process {os.getpid()}, since")
        assert saved(copied_run) == before and draft.is_dir()
        assert [path.name for path in copied_run.parent.glob("run*")] == ["run"]
        assert sd_perf("verify", copied_run)[0] == 0  # readers take no lock


def test_training_holds_the_lock(preset, run, sd_perf, monkeypatch):
    refusals = []

    def look(trainer: Trainer) -> None:
        with pytest.raises(UserError, match="is in use by") as told:
            RunLock().take(run)
        refusals.append(told)

    monkeypatch.setattr(Trainer, "fit", look)
    for options in ([], ["--resume"], ["--fresh"]):
        assert sd_perf("train", "--config", preset, "--run.dir", run, *options)[0] == 0
    assert len(refusals) == 3
    for folder in (run, run.with_name("run.1")):
        assert not (folder / ".lock").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "metrics.superseded.jsonl", "result_0.txt"])
def test_files_that_would_be_waited_for(name, copied_run, preset, tmp_path, refused):
    (copied_run / name).unlink(missing_ok=True)
    command = command_on(copied_run, "resume", preset, tmp_path)
    for spoil in (os.mkfifo, lambda path: path.symlink_to("nowhere")):
        spoil(copied_run / name)
        matches(refused(*command), f"{copied_run / name}: is neither a file nor a folder")
        (copied_run / name).unlink()
