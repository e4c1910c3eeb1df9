"""Shards that vanish, grow or shrink while they are read, slow storage, and unusual samples."""

from __future__ import annotations

import io
import os
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from sd_perf.data.loaders.quick_rows import QuickRows
from sd_perf.errors import BadSampleError, DataError
from tests.data.loaders.test_portable import NUM, delivered, loader, take
from tests.data.test_shards import write_tar
from tests.waiting import PATIENCE


def test_a_shard_that_vanishes_is_read_to_the_end(make_shards):
    """It is open; only who starts anew misses it."""
    config = make_shards(NUM)
    whole, source = take(config), loader(config)
    (Path(config.path) / "00001.tar").unlink()
    stream = source.batches(0)
    assert delivered(list(islice(stream, 5))) == delivered(whole)
    stream.close()
    source.require_unchanged()


def test_a_shard_that_grows_is_named_before_a_checkpoint(make_shards):
    config = make_shards(NUM)
    whole, source = take(config), loader(config)
    with (Path(config.path) / "00001.tar").open("ab") as shard:
        shard.write(bytes(512))
    stream = source.batches(0)
    assert delivered(list(islice(stream, 5))) == delivered(whole)
    stream.close()
    with pytest.raises(DataError, match=r"00001\.tar was written to while it was read"):
        source.require_unchanged()


def test_a_shard_that_shrinks_under_running_threads(make_shards):
    """Its samples are bad from then on: named, and replaced where that is allowed."""
    config = make_shards(NUM, max_bad_samples=100)
    source = loader(config)
    stream = source.batches(0)
    next(stream)
    os.truncate(Path(config.path) / "00001.tar", 600)
    later = list(islice(stream, 9))
    stream.close()
    reasons = {r.reason for batch in later for r in batch.replacements}
    assert reasons and all("the shard shrank since it was indexed" in why for why in reasons)
    assert {r.key[-9:] for batch in later for r in batch.replacements} == {"00001.tar"}


def test_threads_wait_for_storage_together(make_shards, monkeypatch):
    """Four batches are read at once, so that their waits overlap; with fewer this never ends."""
    source = loader(make_shards(NUM, workers=4, prefetch_batches=4), accumulate=6)
    read, together = source._quick.read, threading.Barrier(4, timeout=PATIENCE)

    def slow(number, parts):
        together.wait()
        return read(number, parts)

    monkeypatch.setattr(source._quick, "read", slow)
    stream = source.batches(0)
    assert [int(batch.sample_indices) for batch in islice(stream, 8)] == list(range(8))
    together.abort()
    stream.close()


def npy(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=version)
    return stream.getvalue()


def quick(folder: Path, moments: bytes, context: bytes = b"", caption: bytes = b"x"):
    """What the quick way makes of a sample of moments (8, 2, 2): its arrays and its caption."""
    from sd_perf.config import DataConfig
    from sd_perf.data.shards import ShardIndex

    files = [("a.npy", moments), ("a.txt", caption)]
    write_tar(folder / "0.tar", [*files, ("a.context.npy", context)] if context else files)
    index = ShardIndex.open(folder)
    descriptor = os.open(folder / "0.tar", os.O_RDONLY)
    try:
        rows = QuickRows(index, [descriptor], DataConfig(path=str(folder), latent_size=2))
        out = {"moments": np.empty((8, 2, 2), np.float32)}
        if context:
            out["context"] = np.empty((16, 16), np.float32)
        return out, rows.read(0, out)
    finally:
        os.close(descriptor)


RIGHT = np.arange(32, dtype=np.float32).reshape(1, 8, 2, 2)


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_quick_rows(tmp_path, version):
    states = np.arange(256, dtype=np.float16).reshape(16, 16)
    out, caption = quick(tmp_path, npy(RIGHT, version), npy(states), b"caf\xc3\xa9")
    assert caption == "café"
    assert (out["moments"] == RIGHT[0]).all() and (out["context"] == states).all()


@pytest.mark.parametrize(
    "moments",
    [
        npy(RIGHT.astype(np.float64)),
        npy(RIGHT.astype(">f4")),
        npy(RIGHT.reshape(1, 2, 8, 2)),
        npy(np.asfortranarray(RIGHT)),
        npy(RIGHT[0]),
        npy(RIGHT)[:-4],
        npy(RIGHT) + b"\0",
        npy(np.full_like(RIGHT, np.inf)),
        bytes(128) + RIGHT.tobytes(),
        b"",
    ],
)
def test_all_else_is_left_to_the_reader_that_names_it(tmp_path, moments):
    assert quick(tmp_path, moments)[1] is None


def test_captions_are_judged_on_the_quick_way_too(tmp_path):
    for number, caption in enumerate((b"", b" \n", b"\xff", b"x" * 4097)):
        folder = tmp_path / str(number)
        assert quick(folder, npy(RIGHT), caption=caption)[1] is None


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 65504.0, 6e-8, -0.0])
def test_states_of_16_bits_become_the_same_numbers(tmp_path, value):
    states = np.linspace(-2, 2, 256, dtype=np.float16).reshape(16, 16)
    states[1, 2] = value
    out, caption = quick(tmp_path, npy(RIGHT), npy(states))
    assert (caption == "x") == bool(np.isfinite(value))
    if caption:
        expected = torch.from_numpy(states.astype(np.float32))
        assert torch.equal(torch.from_numpy(out["context"]), expected)


def test_what_is_named_is_what_was_wrong(make_shards):
    with pytest.raises(BadSampleError, match="NaN or infinite"):
        take(make_shards(NUM, bad=[3]))
