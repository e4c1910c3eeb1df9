"""Encoded shards: files that are none, rows that lead elsewhere, and sets that are not whole."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from sd_perf.config import DataConfig
from sd_perf.data.encoded import HEADER_BYTES, Layout, new_layout, read_layout
from sd_perf.data.samples import SampleReader
from sd_perf.data.shards import ShardIndex
from sd_perf.errors import BadSampleError, DataError

SHAPE, TEXT = (8, 2, 2), (3, 5)
KEYS, CAPTIONS = [b"000", b"001", b"0010"], [b"a cat", b"", b"caf\xc3\xa9"]


def write(path: Path, layout: Layout | None = None, value: float = 1.0, **changes) -> Path:
    """A shard of three samples: row i has moments of i + `value` and text states of i."""
    layout = layout or new_layout(KEYS, CAPTIONS, SHAPE, (3, *TEXT))
    values = {
        "moments": np.arange(3, dtype="<f2")[:, None, None, None] + np.full(SHAPE, value, "<f2"),
        "context": np.arange(3, dtype="<f2")[:, None, None] + np.zeros(TEXT, "<f2"),
        "states": np.array([2, 1, 0], "<i8"),
        "caption_ends": np.cumsum([len(caption) for caption in CAPTIONS], dtype="<i8"),
        "keys": np.array(KEYS, "S4"),
        "captions": np.frombuffer(b"".join(CAPTIONS), "|u1"),
        **changes,
    }
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(layout.header() + b"".join(values[name].tobytes() for name in layout.arrays))
    return path


def reader(folder: Path, **changes) -> SampleReader:
    config = DataConfig(
        format="encoded",
        path=str(folder),
        latent_size=2,
        context="precomputed",
        context_tokens=3,
        allow_empty_captions=True,
        **changes,
    )
    index = ShardIndex.open(folder, format="encoded", need_context=True)
    return SampleReader(index, config, in_channels=4, context_dim=5)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return write(tmp_path / "shards" / "0.safetensors")


def test_a_sample(shard):
    samples = [reader(shard.parent).read(number) for number in range(3)]
    assert [sample.caption for sample in samples] == ["a cat", "", "café"]
    assert [float(sample.moments[0, 0, 0]) for sample in samples] == [1, 2, 3]
    assert [float(sample.context[0, 0]) for sample in samples] == [2, 1, 0]
    assert samples[0].moments.shape == SHAPE and samples[0].context.shape == TEXT
    index = ShardIndex.open(shard.parent, format="encoded")
    assert index.samples["key"].tolist() == KEYS
    assert index.name(2) == "0010 in 0.safetensors"


def test_a_shard_without_samples(tmp_path):
    empty = new_layout([], [], SHAPE, (0, *TEXT))
    changes = {name: np.zeros(0, "<i8") for name in ("states", "caption_ends")}
    changes |= {name: np.zeros(0, "|u1") for name in ("keys", "captions", "moments", "context")}
    write(tmp_path / "s" / "0.safetensors", replace(empty, shards=2), **changes)
    write(
        tmp_path / "s" / "1.safetensors",
        replace(new_layout(KEYS, CAPTIONS, SHAPE, (3, *TEXT)), shard=1, shards=2),
    )
    assert reader(tmp_path / "s").read(0).caption == "a cat"


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.write_bytes(b""), "it has no header"),
        (lambda path: path.write_bytes(b"x" * 100), "it has no header"),
        (lambda path: os.truncate(path, 5000), "it has 5,000 bytes, not"),
        (lambda path: os.truncate(path, HEADER_BYTES - 1), "it has no header|delimiter|JSON"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "bytes, not"),
        (lambda path: path.write_bytes((8).to_bytes(8, "little") + b"[1, 2]  "), "no object"),
    ],
)
def test_files_that_are_none(shard, spoil, reason):
    spoil(shard)
    with pytest.raises(DataError, match=rf"0\.safetensors is no encoded shard \(.*({reason})") as e:
        ShardIndex.open(shard.parent, format="encoded")
    assert "\n" not in str(e.value) and str(e.value).endswith("with `sd-perf data encode`")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda h: h["moments"].update(dtype="F32"), "array moments is not F16"),
        (lambda h: h["moments"].update(shape=[3, 8, 2]), "array moments is not F16 of 4 axes"),
        (lambda h: h["moments"].update(shape=[-3, 8, 2, 2]), "array moments is not"),
        (lambda h: h["moments"].update(shape=[2**62, 8, 2, 2]), "array moments is not"),
        (lambda h: h["context"].update(data_offsets=[0, 90]), "array context is not"),
        (lambda h: h["moments"].update(shape="x"), "moments.shape is 'x', not a list"),
        (lambda h: h.pop("keys"), "it lacks 'keys'"),
        (lambda h: h.pop("__metadata__"), "lacks '__metadata__'"),
        (lambda h: h["__metadata__"].update(sd_perf="9"), "it has version '9', and 1 is read"),
        (lambda h: h["__metadata__"].update(shard="x"), "invalid literal"),
        (lambda h: h["__metadata__"].update(recipe="{"), "Expecting"),
    ],
)
def test_headers_that_lie(shard, change, reason):
    data = shard.read_bytes()
    header = json.loads(data[8:HEADER_BYTES])
    change(header)
    text = json.dumps(header).encode().ljust(HEADER_BYTES - 8)
    shard.write_bytes(data[:8] + text + data[HEADER_BYTES:])
    with pytest.raises(DataError, match=reason):
        read_layout(shard)


@pytest.mark.parametrize(
    "changes",
    [
        {"states": np.array([0, 1, 3], "<i8")},
        {"states": np.array([0, -1, 2], "<i8")},
        {"caption_ends": np.array([5, 4, 10], "<i8")},
        {"caption_ends": np.array([5, 5, 9], "<i8")},
        {"caption_ends": np.array([-1, 5, 10], "<i8")},
    ],
)
def test_rows_that_lead_outside(tmp_path, changes):
    write(tmp_path / "shards" / "0.safetensors", **changes)
    with pytest.raises(DataError, match=r"0\.safetensors is no encoded shard \(its rows lead out"):
        ShardIndex.open(tmp_path / "shards", format="encoded")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite(tmp_path, value):
    write(tmp_path / "shards" / "0.safetensors", value=value)
    with pytest.raises(BadSampleError, match="moments has values that are NaN or infinite"):
        reader(tmp_path / "shards").read(1)


def test_a_caption_that_is_no_text(tmp_path):
    text = np.frombuffer(b"a cat" + b"\xff" * 5, "|u1")
    write(tmp_path / "shards" / "0.safetensors", captions=text)
    with pytest.raises(BadSampleError, match="caption is not UTF-8"):
        reader(tmp_path / "shards").read(2)


def test_a_set_that_is_not_whole(tmp_path):
    layout = new_layout(KEYS, CAPTIONS, SHAPE, (3, *TEXT))
    for number in range(3):
        write(tmp_path / "s" / f"{number}.safetensors", replace(layout, shard=number, shards=3))
    assert len(ShardIndex.open(tmp_path / "s", format="encoded")) == 9
    (tmp_path / "s" / "1.safetensors").rename(tmp_path / "1.safetensors")
    with pytest.raises(
        DataError, match=r"0\.safetensors is shard 1 of 3 and stands at place 1 of 2"
    ):
        ShardIndex.open(tmp_path / "s", format="encoded")
    other = replace(layout, shard=1, shards=3, recipe={"image_range": "correct"})
    write(tmp_path / "s" / "1.safetensors", other)
    with pytest.raises(DataError, match=r"1\.safetensors is shard 2 of 3 .*move away what is of"):
        ShardIndex.open(tmp_path / "s", format="encoded")


def test_shards_of_another_config(shard):
    with pytest.raises(
        DataError, match=r"its context have shape \(3, 5\), .* take \(4, 5\); train"
    ):
        index = ShardIndex.open(shard.parent, format="encoded")
        config = replace(
            DataConfig(format="encoded", path="x", latent_size=2, context="precomputed"),
            context_tokens=4,
        )
        SampleReader(index, config, in_channels=4, context_dim=5)


def test_shards_without_text_states(tmp_path):
    write(tmp_path / "s" / "0.safetensors", new_layout(KEYS, CAPTIONS, SHAPE, None))
    assert len(ShardIndex.open(tmp_path / "s", format="encoded")) == 3
    with pytest.raises(DataError, match="3 samples have no text states, the first is 000 in"):
        ShardIndex.open(tmp_path / "s", format="encoded", need_context=True)


def test_a_shard_that_would_fill_the_memory(tmp_path):
    """A sparse file may be as large as it likes."""
    path = tmp_path / "0.safetensors"
    layout = new_layout([b"0"], [b""], (1, 1, 1), None)
    for num, width in ((10**9, 1), (1, 2**32)):
        arrays, offset = {}, HEADER_BYTES
        for name, array in layout.arrays.items():
            shape = (num if name != "captions" else 0, *array.shape[1:])
            shape = (num, width) if name == "keys" else shape
            arrays[name] = replace(array, shape=shape, offset=offset)
            offset += arrays[name].size
        path.write_bytes(Layout(arrays).header())
        os.truncate(path, offset)
        with pytest.raises(DataError, match="more samples, or longer keys, than a shard may have"):
            read_layout(path)


def test_a_shard_that_shrinks(shard):
    reads = reader(shard.parent)
    os.truncate(shard, HEADER_BYTES + 70)
    with pytest.raises(BadSampleError, match=r"moments ends after 6 of 64 bytes; the shard shrank"):
        reads.read(1)
    with pytest.raises(DataError, match="was written to while it was read"):
        reads.require_unchanged()
