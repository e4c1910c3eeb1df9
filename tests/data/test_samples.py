"""Decoding a sample: what is accepted, and a reason for all that is not."""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from sd_perf.data.samples import SampleReader, parse_caption, parse_context, parse_moments
from sd_perf.data.shards import ShardIndex
from sd_perf.errors import BadSampleError, DataError


def npy(array: np.ndarray, version=None, allow_pickle: bool = False) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version=version, allow_pickle=allow_pickle)
    return stream.getvalue()


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was run",))


GOOD = np.arange(8 * 4 * 4, dtype=np.float32).reshape(1, 8, 4, 4)


@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
def test_moments(version):
    moments = parse_moments(npy(GOOD, version), 4, 4)
    assert moments.dtype == np.float32 and (moments == GOOD[0]).all()


def with_value(value: float) -> np.ndarray:
    array = GOOD.copy()
    array[0, 7, 3, 3] = value
    return array


def claimed(shape: tuple[int, ...]) -> bytes:
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, header)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (npy(GOOD[0]), r"shape \(8, 4, 4\), not \(1, 8, 4, 4\)"),
        (npy(GOOD[:, :4]), "shape"),
        (npy(np.asfortranarray(GOOD)), "Fortran"),
        (npy(GOOD.astype(np.float16)), "dtype float16, not float32"),
        (npy(GOOD.astype(">f4")), "dtype >f4"),
        (npy(np.array([Bomb()], dtype=object), allow_pickle=True), "pickled"),
        (pickle.dumps(Bomb()), "not a .npy"),
        (npy(with_value(np.nan)), "NaN or infinite"),
        (npy(with_value(-np.inf)), "NaN or infinite"),
        (npy(GOOD)[:-1], "511 bytes of values, not 512"),
        (npy(GOOD) + b"x", "513 bytes"),
        (npy(GOOD)[:20], "not a .npy"),
        (b"", "not a .npy"),
        (b"\x93NUMPY\x09\x00" + bytes(100), "not a .npy"),
        (b"PK\x03\x04 an npz", "not a .npy"),
        (claimed((1, 8, 4, 4)), "0 bytes of values"),
        (claimed((1 << 40, 8)), "shape"),
    ],
)
def test_bad_moments(data, reason):
    with pytest.raises(BadSampleError, match=reason):
        parse_moments(data, 4, 4)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_context(dtype):
    states = np.ones((3, 5), dtype)
    assert parse_context(npy(states), 3, 5).dtype == dtype
    with pytest.raises(BadSampleError, match="context has shape"):
        parse_context(npy(states), 4, 5)
    with pytest.raises(BadSampleError, match="float16 or float32"):
        parse_context(npy(states.astype(np.float64)), 3, 5)


def test_captions():
    assert parse_caption("a naïve 猫 ".encode(), 20, allow_empty=False) == "a naïve 猫 "
    assert parse_caption(b"", 20, allow_empty=True) == ""
    assert parse_caption("é".encode() * 10, 20, allow_empty=False) == "é" * 10
    for data, reason in [
        (b"", "empty"),
        (b" \n", "empty"),
        (b"caf\xe9", "not UTF-8 .* byte 3"),
        (b"x" * 21, "21 bytes"),
    ]:
        with pytest.raises(BadSampleError, match=reason):
            parse_caption(data, 20, allow_empty=False)


def test_reader(make_shards):
    config = make_shards()
    reader = SampleReader(ShardIndex.open(config.path), config, 4, 5)
    sample = reader.read(7)
    assert (
        sample.caption == "caption 7"
        and (sample.moments == 7).all()
        and (sample.context == -7).all()
    )
    assert sample.moments.shape == (8, 2, 2) and sample.context.shape == (3, 5)


def test_shards_written_to_since_they_were_opened(make_shards):
    config = make_shards()
    os.utime(Path(config.path) / "00000.tar", ns=(1, 1))  # clocks of files are coarse
    reader = SampleReader(ShardIndex.open(config.path), config, 4, 5)
    shard = Path(config.path) / "00001.tar"
    content = shard.read_bytes()
    replaced = shard.with_name("new")
    replaced.write_bytes(content[::-1])
    replaced.rename(shard)  # another file: what is open stays what it was
    reader.require_unchanged()
    assert reader.read(4).caption == "caption 4"
    with (Path(config.path) / "00000.tar").open("r+b") as stream:
        stream.write(content[:1])
    with pytest.raises(DataError, match=r"00000\.tar was written to while it was read"):
        reader.require_unchanged()


def test_reader_opens_more_shards_than_the_soft_limit(make_shards):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    config = make_shards(num=400)
    index = ShardIndex.open(config.path)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    try:
        assert SampleReader(index, config, 4, 5).read(399).caption == "caption 399"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
