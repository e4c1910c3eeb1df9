"""LAION's metadata, filtered as the benchmark does with pandas, and bad files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sd_perf.data.laion.metadata import NO_ENTRY, UNKNOWN, filter_metadata
from sd_perf.errors import DataError

pa = pytest.importorskip("pyarrow", reason="needs pyarrow")
parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
LICENCES = ("?", "cc-by", "?", None, "cc-by-nc", "cc-by", "?")
NAME = "part-00000-5b54.c000.snappy.parquet"


def write_metadata(path: Path, rows: int, **options) -> None:
    """Rows in LAION-400M's schema; their licences repeat LICENCES."""
    path.parent.mkdir(exist_ok=True)
    columns = {
        "SAMPLE_ID": pa.array(range(rows), pa.int64()),
        "URL": pa.array([f"http://127.0.0.1/{row}.jpg" for row in range(rows)]),
        "TEXT": pa.array([None if row % 9 == 8 else f"picture {row}" for row in range(rows)]),
        "HEIGHT": pa.array([300] * rows, pa.int32()),
        "WIDTH": pa.array([400] * rows, pa.int32()),
        "LICENSE": pa.array([LICENCES[row % len(LICENCES)] for row in range(rows)], pa.string()),
        "NSFW": pa.array(["UNLIKELY"] * rows),
        "similarity": pa.array([0.3] * rows, pa.float64()),
    }
    parquet.write_table(pa.table(columns), path, **options)


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    write_metadata(tmp_path / "metadata" / NAME, 700, row_group_size=64)
    write_metadata(tmp_path / "metadata" / "part-00001.parquet", 3)
    return tmp_path / "metadata"


def test_the_rows_are_those_of_pandas(metadata, tmp_path):
    pandas = pytest.importorskip("pandas")
    counts = filter_metadata(metadata, tmp_path / "out")
    assert counts[NAME] == {UNKNOWN: 300, "cc-by": 200, NO_ENTRY: 100, "cc-by-nc": 100}
    for path in metadata.iterdir():
        table = pandas.read_parquet(path)
        expected = table[table["LICENSE"] != "?"].reset_index(drop=True)
        filtered = pandas.read_parquet(tmp_path / "out" / path.name)
        pandas.testing.assert_frame_equal(filtered, expected)


def test_a_stopped_run_goes_on(metadata, tmp_path):
    counts = filter_metadata(metadata, tmp_path / "out")
    kept = tmp_path / "out" / NAME
    before = kept.stat().st_mtime_ns
    (tmp_path / "out" / "part-00001.parquet").unlink()
    steps = []
    again = filter_metadata(metadata, tmp_path / "out", lambda done, of: steps.append((done, of)))
    assert again == counts and kept.stat().st_mtime_ns == before
    assert steps == [(0, 2), (1, 2), (2, 2)]


def test_files_of_others_are_not_overwritten(metadata, tmp_path):
    write_metadata(tmp_path / "out" / NAME, 5)
    before = (tmp_path / "out" / NAME).read_bytes()
    with pytest.raises(DataError, match="was not made from the file of its name"):
        filter_metadata(metadata, tmp_path / "out")
    assert (tmp_path / "out" / NAME).read_bytes() == before
    filter_metadata(metadata, tmp_path / "new")
    write_metadata(metadata / NAME, 701)
    with pytest.raises(DataError, match="was not made from the file of its name"):
        filter_metadata(metadata, tmp_path / "new")
    with pytest.raises(DataError, match="is the folder that is read"):
        filter_metadata(metadata, metadata)


def test_damaged_files_leave_nothing(metadata, tmp_path):
    path, out = metadata / NAME, tmp_path / "out"
    content = path.read_bytes()
    middle = len(content) // 3
    damaged = {
        "is no parquet file": content[:-9],
        "is damaged": content[: middle // 4] + bytes(middle) + content[middle // 4 + middle :],
    }
    for message, data in damaged.items():
        path.write_bytes(data)
        with pytest.raises(DataError, match=message) as info:
            filter_metadata(metadata, out)
        assert NAME in str(info.value) and "\n" not in str(info.value)
        assert list(out.iterdir()) == []


def test_other_tables_and_folders(tmp_path):
    (tmp_path / "in").mkdir()
    with pytest.raises(DataError, match=r"holds no \*\.parquet files"):
        filter_metadata(tmp_path / "in", tmp_path / "out")
    parquet.write_table(pa.table({"URL": ["x"]}), tmp_path / "in" / "a.parquet")
    with pytest.raises(DataError, match="has no column SAMPLE_ID and no TEXT and no LICENSE"):
        filter_metadata(tmp_path / "in", tmp_path / "out")


@pytest.mark.slow
def test_memory_is_bounded(tmp_path):
    """A million rows in one row group: less than half of them are in memory at a time."""
    path = tmp_path / "in" / "a.parquet"
    write_metadata(path, 1_000_000, row_group_size=2**30)
    code = """
import sys
from pathlib import Path
import pyarrow
from sd_perf.data.laion.metadata import filter_metadata
counts = filter_metadata(Path(sys.argv[1]), Path(sys.argv[2]))
print(counts["a.parquet"].total(), pyarrow.default_memory_pool().max_memory())
"""
    command = [sys.executable, "-c", code, str(path.parent), str(tmp_path / "out")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows, peak = map(int, output.split())
    assert rows == 1_000_000 and peak < parquet.read_table(path).nbytes / 2


@pytest.mark.parametrize("licences", [[1, 2], [["a"], ["b"]], [{"a": 1}, {"a": 2}]], ids=str)
def test_licences_that_are_no_text(licences, tmp_path):
    """pyarrow cannot compare them: one sentence, and no file is begun."""
    write_metadata(tmp_path / "in" / NAME, 2)
    table = parquet.read_table(tmp_path / "in" / NAME)
    place = table.column_names.index("LICENSE")
    parquet.write_table(
        table.set_column(place, "LICENSE", pa.array(licences)), tmp_path / "in" / NAME
    )
    with pytest.raises(DataError, match="is damaged"):
        filter_metadata(tmp_path / "in", tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_column_twice(tmp_path):
    write_metadata(tmp_path / "in" / NAME, 2)
    table = parquet.read_table(tmp_path / "in" / NAME)
    parquet.write_table(table.append_column("LICENSE", table["URL"]), tmp_path / "in" / NAME)
    with pytest.raises(DataError, match="has the column LICENSE twice"):
        filter_metadata(tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize(
    "record",
    [None, b"[" * 100_000, b"[]", b'{"rows": {"a": 1e400}}', b'{"rows": {"a": ' + 5000 * b"9"],
    ids=["none", "deep", "list", "infinite", "digits"],
)
def test_records_that_are_none(record, tmp_path):
    """The file that would be written is there, and is not of this function."""
    write_metadata(tmp_path / "in" / NAME, 2)
    write_metadata(tmp_path / "out" / NAME, 2, store_schema=False)
    if record is not None:
        table = parquet.read_table(tmp_path / "out" / NAME)
        table = table.replace_schema_metadata({b"sd_perf_filter": record})
        parquet.write_table(table, tmp_path / "out" / NAME)
    with pytest.raises(DataError, match="is there and was not made from the file of its name"):
        filter_metadata(tmp_path / "in", tmp_path / "out")
