"""Arrays of .npz files: what np.savez writes is read, and nothing that claims to be larger."""

from __future__ import annotations

import io
import tracemalloc
import zipfile

import numpy as np
import pytest

from sd_perf.data import npz as module
from sd_perf.data.npz import read_npz


def npz(**arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def zipped(content: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        archive.writestr("a.npy", content)
    return stream.getvalue()


def header(shape: tuple[int, ...], dtype: str = "<f4") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        stream, {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return stream.getvalue()


def test_arrays_come_back():
    rows = np.array([(1, b"a"), (2, b"bc")], dtype=[("n", "<i4"), ("key", "S2")])
    arrays = {"x": np.arange(6.0).reshape(2, 3), "rows": rows, "one": np.array(1)}
    found = read_npz(io.BytesIO(npz(**arrays)))
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)


def test_a_compressed_file_unpacks_to_what_is_allowed():
    stream = io.BytesIO()
    np.savez_compressed(stream, x=np.asfortranarray(np.zeros((64, 64))))
    with pytest.raises(ValueError, match="larger than they may be"):
        read_npz(stream)
    found = read_npz(stream, unpacked=40_000)
    assert np.array_equal(found["x"], np.zeros((64, 64)))


def objects() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([{}], dtype=object), allow_pickle=True)
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no zip",
        npz(x=np.ones(9))[:-30],
        zipped(b"no array"),
        zipped(header((1 << 40,))),
        zipped(header((-1,)) + bytes(4)),
        zipped(header((3,)) + bytes(8)),
        zipped(header((1,), "|O") + bytes(8)),
        zipped(objects()),
        zipped(b"\x93NUMPY\x02\x00\xff\xff\xff\x7f" + b"(" * 100_000),
        zipped(header((1 << 24,)) + bytes(1 << 26), zipfile.ZIP_DEFLATED),
    ],
)
def test_what_is_refused_takes_no_memory(content):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            read_npz(io.BytesIO(content))
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (1, 8, 4, 4), (3, 2)])
@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", "<i8", "|u1", "|b1"])
def test_plain_headers_are_read_as_numpy_reads_them(dtype, shape, order, monkeypatch):
    """... and by no parser of Python's, which is not safe in threads."""
    stream = io.BytesIO()
    np.save(stream, np.zeros(shape, dtype, order=order))
    theirs = module._evaluated_header(stream.getvalue())
    monkeypatch.setattr(module, "_evaluated_header", lambda _: pytest.fail("was evaluated"))
    assert module.read_npy_header(stream.getvalue()) == theirs


@pytest.mark.parametrize(
    ("text", "taken"),
    [
        (b"{'descr': '<f4', 'fortran_order': False, 'shape': (5), }", False),
        (b"{'descr': '<f4', 'fortran_order': False, 'shape': (05,), }", False),
        (b"{'descr': '<f3', 'fortran_order': False, 'shape': (5,), }", False),
        (b"{'shape': (5,), 'descr': '<f4', 'fortran_order': False}", True),
        (b"{'descr': '>f4', 'fortran_order': False, 'shape': (5L,), }", True),
    ],
)
def test_other_headers_are_numpys_to_judge(text, taken):
    data = b"\x93NUMPY\x01\x00" + (len(text) + 1).to_bytes(2, "little") + text + b"\n"
    if taken:
        shape, is_fortran, dtype, offset = module.read_npy_header(data)
        assert (shape, is_fortran, dtype.itemsize, offset) == ((5,), False, 4, len(data))
    else:
        with pytest.raises(ValueError):
            module.read_npy_header(data)
    with pytest.raises(ValueError):
        module.read_npy_header(data.replace(b"\x01\x00", b"\x01\x00\xff", 1))
