"""Conversion of checkpoints of torch's distributed format: what is kept, and what is refused."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from sd_perf.errors import CheckpointError, UserError
from sd_perf.runs.convert import convert_run, read_old_tensors
from sd_perf.runs.folder import read_run_id
from sd_perf.runs.lock import RunLock
from tests.runs.test_checkpoints import tensors

SCALES = {"precision_state.x": torch.arange(7, dtype=torch.uint8)}

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def write_old(path: Path, state: dict[str, Any]) -> None:
    """As the trainer wrote checkpoints before they had digests."""
    stored = {**tensors(2.5), **SCALES}
    writer = dcp.FileSystemWriter(path, single_file_per_rank=True)
    dcp.save(stored, storage_writer=writer, no_dist=True)
    (path / "state.json").write_text(json.dumps(state))


@pytest.fixture
def old(tmp_path) -> Path:
    write_old(tmp_path / "samples_0000000040", {"samples": 40})
    return tmp_path / "samples_0000000040"


def test_tensors_are_kept(old):
    read = read_old_tensors(old)
    assert read.keys() == {*tensors(), *SCALES}
    for name, tensor in {**tensors(2.5), **SCALES}.items():
        assert torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype


def test_a_run_goes_on_from_a_converted_checkpoint(make_config, make_trainer):
    """It was saved in the old format, of a run without an id."""
    trainer = make_trainer(make_config())
    run, state = trainer.folder, trainer.state()
    manifest = json.loads((run / "run_manifest.json").read_text())
    del manifest["run_id"]
    (run / "run_manifest.json").write_text(json.dumps(manifest))
    path = run / "checkpoints" / "samples_0000000040"
    writer = dcp.FileSystemWriter(path, single_file_per_rank=True)
    dcp.save(trainer.step.state(), storage_writer=writer, no_dist=True)
    for key in ("run_id", "config_digest"):
        del state[key]
    (path / "state.json").write_text(json.dumps({**state, "samples": 40, "steps": 10}))
    with pytest.raises(CheckpointError, match=f"old format.*convert-checkpoints {run}`"):
        trainer.load(path)

    [(converted, kept)] = convert_run(run)
    assert converted == path and kept.name == "old_format_samples_0000000040" and kept.is_dir()
    assert list(convert_run(run)) == []
    resumed = make_trainer(make_config(), resume=True)
    assert resumed.samples == 40 and read_run_id(run)
    for name, tensor in trainer.step.state().items():
        assert torch.equal(resumed.step.state()[name], tensor)


class Runs:
    """A pickle that makes a folder when it is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


def test_code_in_the_metadata_is_refused_and_not_run(old, tmp_path):
    (old / ".metadata").write_bytes(pickle.dumps(Runs(tmp_path / "made")))
    with pytest.raises(CheckpointError, match=r"it names \w+\.mkdir, which is no metadata"):
        read_old_tensors(old)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["../outside.distcp", "/etc/passwd", "state.json", 7, ["x"]])
def test_files_outside_the_folder_are_refused(name, old):
    metadata = dcp.FileSystemReader(old).read_metadata()
    next(iter(metadata.storage_data.values())).relative_path = name
    (old / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"names the file .* which is not the format's"):
        read_old_tensors(old)


def test_a_link_is_refused(old, tmp_path):
    (old / "__0_0.distcp").rename(tmp_path / "outside")
    (old / "__0_0.distcp").symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match="which is not the format's"):
        read_old_tensors(old)


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
def test_damaged(file, old):
    os.truncate(old / file, (old / file).stat().st_size // 2)
    with pytest.raises(CheckpointError, match="cannot be converted"):
        read_old_tensors(old)


@pytest.mark.parametrize("content", [b"", b"x", pickle.dumps(3), pickle.dumps({"a": 1}), b"."])
def test_metadata_that_is_none(content, old):
    (old / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be converted"):
        read_old_tensors(old)


ENTRY = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
LONG = b"(" + b"N" * 40 + b"t"
"""opcodes of a tuple of 40"""


@pytest.mark.parametrize(
    ("opcodes", "told"),
    [
        (b"}(K\x01NK\x02Nu", "a table with a key that is int"),
        (b"})Ns", "a table with a key that is tuple"),
        (ENTRY + LONG + b"R", "an object of 40 parts"),
        (ENTRY + LONG + b"\x81", "an object of 40 parts"),
        (ENTRY + b")R" + LONG + b"b", "an object of 40 parts"),
        (b"L7L\n", "an instruction that no metadata needs"),
        (b"NP7\n.", "an instruction that no metadata needs"),
        (b"\x8f", "an instruction that no metadata needs"),
    ],
)
def test_what_could_take_for_ever_is_refused(opcodes, told, old):
    """Keys whose hash the file chooses, and large arguments, of which it may have millions."""
    (old / ".metadata").write_bytes(b"\x80\x02" + opcodes + b".")
    with pytest.raises(CheckpointError, match=told):
        read_old_tensors(old)


def test_a_run_in_use_is_left_alone(make_config, make_trainer):
    run = make_trainer(make_config()).folder
    with RunLock() as lock:
        lock.take(run)
        with pytest.raises(UserError, match="is in use by"):
            list(convert_run(run))


def test_a_state_that_cannot_be_is_not_converted(make_config, make_trainer):
    run = make_trainer(make_config()).folder
    path = run / "checkpoints" / "samples_0000000040"
    write_old(path, {"samples": True, "steps": 10})
    with pytest.raises(CheckpointError, match="samples is True, not a whole number"):
        list(convert_run(run))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]
    assert (path / ".metadata").is_file()
