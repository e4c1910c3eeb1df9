"""The checkpoint store: what it leaves on disk, and what it says of unusable folders."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from sd_perf.errors import CheckpointError
from sd_perf.runs.checkpoints import CheckpointStore, load_component, load_tensors, read_state


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {
        "model.a": torch.full((3, 2), value),
        "exp_avg.a": torch.full((3, 2), -value),
        "model.b": torch.arange(5.0),
    }


def save(store: CheckpointStore, samples: int, value: float = 1.0) -> Path:
    path = store.save(tensors(value), {"samples": samples})
    store.wait()
    return path


def test_round_trip(tmp_path):
    path = save(CheckpointStore(tmp_path), 32, 2.5)
    assert path.name == "samples_0000000032" and read_state(path) == {"samples": 32}
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    load_tensors(path, into)
    assert all(torch.equal(into[name], tensor) for name, tensor in tensors(2.5).items())
    assert load_component(path, "exp_avg").keys() == {"a"}


def test_host_copy_is_taken_before_save_returns(tmp_path):
    store, live = CheckpointStore(tmp_path), tensors(1.0)
    path = store.save(live, {"samples": 1})
    for tensor in live.values():
        tensor.fill_(99.0)
    store.wait()
    assert load_component(path, "model")["a"].eq(1.0).all()


def test_newest_and_retention(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for samples in (10, 30, 200):
        save(store, samples)
    assert [path.name for path in store.complete()] == ["samples_0000000030", "samples_0000000200"]
    assert store.newest() == tmp_path / "samples_0000000200"
    assert CheckpointStore(tmp_path / "none").newest() is None


def test_a_checkpoint_that_is_half_removed_is_none(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, keep=1)
    save(store, 10)

    remove = shutil.rmtree

    def killed(folder, *arguments, **options):
        if (Path(folder) / "state.json").is_file():  # of all that is removed, the old checkpoint
            (Path(folder) / "state.json").unlink()
            raise OSError(5, "stopped")
        remove(folder, *arguments, **options)

    with monkeypatch.context() as patched, pytest.raises(CheckpointError, match="stopped"):
        patched.setattr(shutil, "rmtree", killed)
        save(store, 20)
    assert [path.name for path in store.complete()] == ["samples_0000000020"]
    save(store, 30)
    assert [path.name for path in tmp_path.iterdir()] == ["samples_0000000030"]


def test_partial_folders_are_no_checkpoints_and_are_cleared(tmp_path):
    store = CheckpointStore(tmp_path)
    (tmp_path / ".writing_samples_0000000050").mkdir(parents=True)
    assert store.newest() is None
    save(store, 60)
    assert [path.name for path in tmp_path.iterdir()] == ["samples_0000000060"]


def test_a_saved_position_is_not_overwritten(tmp_path):
    store = CheckpointStore(tmp_path)
    path = save(store, 10, 1.0)
    save(store, 10, 2.0)
    assert load_component(path, "model")["a"].eq(1.0).all()


def test_missing(tmp_path):
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        load_component(tmp_path / "absent", "model")


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        load_component(tmp_path, "model")


@pytest.mark.parametrize("file", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.99])
def test_truncated(file, fraction, tmp_path):
    path = save(CheckpointStore(tmp_path), 10)
    data = (path / file).read_bytes()
    (path / file).write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(CheckpointError, match=r"truncated|damaged"):
        load_component(path, "model")


def test_file_gone(tmp_path):
    path = save(CheckpointStore(tmp_path), 10)
    (path / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match="truncated"):
        load_component(path, "model")


def test_another_shape(tmp_path):
    path = save(CheckpointStore(tmp_path), 10)
    with pytest.raises(
        CheckpointError, match=r"model\.a has shape \(3, 2\) there and \(4, 2\) in this model"
    ):
        load_tensors(path, {"model.a": torch.zeros(4, 2)})


def test_another_model(tmp_path):
    path = save(CheckpointStore(tmp_path), 10)
    with pytest.raises(CheckpointError, match=r"does not hold model\.c"):
        load_tensors(path, {"model.c": torch.zeros(1)})


def test_a_failed_write_is_told_and_leaves_the_last_one(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    newest = save(store, 10)

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sd_perf.runs.checkpoints.dcp.save", fail)
    store.save(tensors(), {"samples": 20})
    with pytest.raises(
        CheckpointError,
        match=r"No space left on device.*newest complete checkpoint is .*samples_0000000010",
    ):
        store.wait()
    store.wait()  # told once
    assert list(tmp_path.iterdir()) == [newest]


def test_disk_full(mount_tmpfs):
    small_disk = mount_tmpfs("size=256k")
    store = CheckpointStore(small_disk)
    newest = save(store, 10)
    store.save({"model.a": torch.randn(100_000)}, {"samples": 20})
    with pytest.raises(
        CheckpointError, match=r"could not be written \(.*\); the newest complete checkpoint is"
    ):
        store.wait()
    assert store.complete() == [newest]
    assert shutil.disk_usage(small_disk).free > 128 * 1024  # the failed write gave its space back
    load_component(newest, "model")
