"""The checkpoint store: what it leaves on disk, and what it says of unusable folders."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sd_perf.errors import CheckpointError
from sd_perf.runs.checkpoint_files import (
    read_state,
    state_digest,
    write_shard,
    write_state,
)
from sd_perf.runs.checkpoints import CheckpointStore, load_component, load_tensors

TENSORS = "model_00000_of_00001.safetensors"


def tensors(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {
        "model.a": torch.full((3, 2), value),
        "exp_avg.a": torch.full((3, 2), -value),
        "model.b": torch.arange(5.0),
    }


def training_state(samples: int) -> dict[str, Any]:
    return {
        "run_id": "0123",
        "config_digest": "4567",
        "samples": samples,
        "steps": samples,
        "seed": 0,
        "bad_samples": 0,
        "dataset": {"samples": 64, "fingerprint": "89ab"},
        "callbacks": {},
    }


def save(store: CheckpointStore, samples: int, value: float = 1.0) -> Path:
    store.begin()
    path = store.save(tensors(value), training_state(samples))
    store.wait()
    return path


def reseal(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change state.json as someone would who also renews its digest."""
    state = json.loads((path / "state.json").read_text())
    del state["sha256"]
    change(state)
    text = json.dumps({**state, "sha256": state_digest(state)}, allow_nan=True)
    (path / "state.json").write_text(text)


def test_round_trip(tmp_path):
    path = save(CheckpointStore(tmp_path), 32, 2.5)
    assert path.name == "samples_0000000032"
    assert read_state(path).items() >= {"format": 2, **training_state(32)}.items()
    into = load_tensors(path, tensors())
    assert all(torch.equal(into[name], tensor) for name, tensor in tensors(2.5).items())
    assert load_component(path, "exp_avg").keys() == {"a"}


def test_host_copy_is_taken_before_save_returns(tmp_path):
    store, live = CheckpointStore(tmp_path), tensors(1.0)
    path = store.save(live, training_state(1))
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


@pytest.mark.parametrize("file", ["state.json", TENSORS])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.99])
def test_truncated(file, fraction, tmp_path):
    path = save(CheckpointStore(tmp_path), 10)
    data = (path / file).read_bytes()
    (path / file).write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(CheckpointError, match=r"truncated|not a checkpoint"):
        load_component(path, "model")


def test_file_gone(tmp_path):
    path = save(CheckpointStore(tmp_path), 10)
    (path / TENSORS).unlink()
    with pytest.raises(CheckpointError, match=f"{TENSORS}: cannot be read .*No such file"):
        load_component(path, "model")


def test_appended(tmp_path):
    path = save(CheckpointStore(tmp_path), 10)
    with (path / TENSORS).open("ab") as file:
        file.write(b"x")
    with pytest.raises(CheckpointError, match=f"{TENSORS}: damaged"):
        load_component(path, "model")


@pytest.mark.parametrize("name", ["state.json", TENSORS])
def test_any_flipped_bit_is_told(name, tmp_path):
    """Every byte of both files, one bit each."""
    path = save(CheckpointStore(tmp_path), 10)
    data = (path / name).read_bytes()
    for place, byte in enumerate(data):
        flipped = bytes([byte ^ 1 << place % 8])
        (path / name).write_bytes(data[:place] + flipped + data[place + 1 :])
        with pytest.raises(CheckpointError, match=r"damaged|not a checkpoint"):
            load_component(path, "model")
    (path / name).write_bytes(data)
    load_component(path, "model")


def test_nothing_is_read_of_a_damaged_checkpoint(tmp_path):
    path = save(CheckpointStore(tmp_path), 10)
    data = bytearray((path / "exp_avg_00000_of_00001.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "exp_avg_00000_of_00001.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"exp_avg_\S+: damaged"):
        load_tensors(path, tensors())


def test_a_file_of_another_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path)
    first, second = save(store, 10, 1.0), save(store, 20, 2.0)
    shutil.copy(first / TENSORS, second / TENSORS)
    with pytest.raises(CheckpointError, match=f"{TENSORS}: damaged"):
        load_component(second, "model")


WHOLE = "not a whole number from 0"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("samples", 41, "samples is 41, not what the folder's name says"),
        ("samples", -4, f"samples is -4, {WHOLE}"),
        ("samples", 1e30, rf"samples is 1e\+30, {WHOLE}"),
        ("samples", 2**63, "a number of 19 digits, which is none of 64 bits"),
        ("samples", float("nan"), r"not a checkpoint of sd-perf \(state.json: NaN is no number"),
        ("samples", float("inf"), "Infinity is no number"),
        ("samples", True, f"samples is True, {WHOLE}"),
        ("samples", 10.0, rf"samples is 10\.0, {WHOLE}"),
        ("samples", "10", f"samples is '10', {WHOLE}"),
        ("samples", None, f"samples is None, {WHOLE}"),
        ("steps", -1, f"steps is -1, {WHOLE}"),
        ("seed", [0], rf"seed is \[0\], {WHOLE}"),
        ("bad_samples", {}, f"bad_samples is {{}}, {WHOLE}"),
        ("run_id", 7, "run_id is 7, not a short text"),
        ("run_id", "x" * 10_000, "run_id is 'x{59}[.]{3}, not a short text"),
        ("run_id", "a\n\x1b[1m", r"run_id is 'a\\n\\x1b\[1m', not a short text"),
        ("dataset", None, "dataset is None, not an object"),
        ("callbacks", {"Signals": 1}, "callbacks is .*, not an object of objects"),
        ("format", 3, "has format 3, and this version of sd-perf reads formats up to 2"),
        ("files", {}, "'model.a' lies in a file that is not listed"),
        ("files", {"../../outside.safetensors": {"size": 0, "sha256": "0" * 64}}, "files is"),
        ("files", {"/etc/passwd": {"size": 0, "sha256": "0" * 64}}, "files is"),
        ("files", {TENSORS: {"size": -1, "sha256": "0" * 64}}, "files is"),
        ("files", {TENSORS: {"size": 1, "sha256": "short"}}, "files is"),
        ("files", [TENSORS], "files is"),
        ("tensors", {"model.a": TENSORS}, "tensors is"),
        ("tensors", {"model.a": {"file": TENSORS, "shape": 3, "dtype": "int32"}}, "tensors is"),
        ("tensors", {"model.a": {"file": TENSORS, "shape": [], "dtype": []}}, "tensors is"),
        ("more", 1, "'more' is unknown"),
    ],
)
def test_entries_that_cannot_be(key, value, words, tmp_path):
    path = save(CheckpointStore(tmp_path), 10)
    reseal(path, lambda state: state.update({key: value}))
    with pytest.raises(CheckpointError, match=words) as told:
        load_component(path, "model")
    assert "\n" not in str(told.value) and len(str(told.value)) < 600


@pytest.mark.parametrize("key", ["run_id", "samples", "seed", "files", "tensors"])
def test_entries_that_are_missing(key, tmp_path):
    path = save(CheckpointStore(tmp_path), 10)
    reseal(path, lambda state: state.pop(key))
    with pytest.raises(CheckpointError, match=f"state.json: {key} is missing"):
        read_state(path)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "[]", f'{{"samples": {"9" * 5000}}}', "7", "null", '{"samples": 10}', "\0"],
)
def test_a_state_that_is_none(text, tmp_path):
    path = save(CheckpointStore(tmp_path), 10)
    (path / "state.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"not a checkpoint|damaged"):
        read_state(path)


def test_a_pipe_and_a_link_are_not_opened(tmp_path):
    path = save(CheckpointStore(tmp_path / "checkpoints"), 10)
    (path / TENSORS).rename(tmp_path / "outside")
    (path / TENSORS).symlink_to(tmp_path / "outside")
    with pytest.raises(CheckpointError, match=f"{TENSORS}: is no regular file"):
        load_component(path, "model")
    (path / "state.json").unlink()
    os.mkfifo(path / "state.json")
    with pytest.raises(CheckpointError, match=r"state\.json: cannot be read \(it is a FIFO\)"):
        read_state(path)


def test_tensors_unlike_their_entries(tmp_path):
    path = save(CheckpointStore(tmp_path), 10)
    reseal(path, lambda state: state["tensors"]["model.a"].update(dtype="int32"))
    with pytest.raises(CheckpointError, match=r"'model\.a' is not as state\.json says"):
        load_component(path, "model")


def test_shards_of_several_ranks_are_read_as_one(tmp_path):
    path, parts = tmp_path / "samples_0000000010", list(tensors().items())
    path.mkdir()
    shards = [write_shard(path, dict(parts[rank::3]), rank, 3) for rank in range(3)]
    write_state(path, training_state(10), *shards)
    assert (path / "exp_avg_00001_of_00003.safetensors").is_file()
    into = load_tensors(path, dict(parts))
    assert all(torch.equal(into[name], tensor) for name, tensor in parts)
    assert load_component(path, "model").keys() == {"a", "b"}


def test_format_1_is_read(tmp_path):
    path = save(CheckpointStore(tmp_path), 10)
    reseal(path, lambda state: state.update(format=1))
    assert load_component(path, "model").keys() == {"a", "b"}


def test_files_can_be_read_by_others(tmp_path):
    path = save(CheckpointStore(tmp_path), 10)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o644}


def test_a_checkpoint_of_the_old_format(tmp_path):
    """It is told by its files; its pickle is not opened."""
    path = tmp_path / "samples_0000000010"
    path.mkdir()
    (path / "state.json").write_text('{"samples": 10}')
    os.mkfifo(path / ".metadata")
    with pytest.raises(CheckpointError, match="has the old format, which is a pickle"):
        load_component(path, "model")


def test_another_shape(tmp_path):
    path = save(CheckpointStore(tmp_path), 10)
    with pytest.raises(
        CheckpointError, match=r"model\.a has shape \(3, 2\) there and \(4, 2\) in this model"
    ):
        load_tensors(path, {"model.a": torch.zeros(4, 2)})


def test_another_dtype(tmp_path):
    path = save(CheckpointStore(tmp_path), 10)
    with pytest.raises(CheckpointError, match=r"model\.a is float32 there and torch\.float16 in"):
        load_tensors(path, {"model.a": torch.zeros(3, 2, dtype=torch.float16)})


def test_another_model(tmp_path):
    path = save(CheckpointStore(tmp_path), 10)
    with pytest.raises(CheckpointError, match=r"does not hold model\.c"):
        load_tensors(path, {"model.c": torch.zeros(1)})


def test_a_failed_write_is_told_and_leaves_the_last_one(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path)
    newest = save(store, 10)

    def fail(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sd_perf.runs.checkpoint_files.save_file", fail)
    store.save(tensors(), training_state(20))
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
    store.save({"model.a": torch.randn(100_000)}, training_state(20))
    with pytest.raises(
        CheckpointError, match=r"could not be written \(.*\); the newest complete checkpoint is"
    ):
        store.wait()
    assert store.complete() == [newest]
    assert shutil.disk_usage(small_disk).free > 128 * 1024  # the failed write gave its space back
    load_component(newest, "model")
