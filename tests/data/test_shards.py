"""The index of moments shards: what it finds, when it is built again, and bad shards."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest

from sd_perf.data import shards
from sd_perf.data.shards import ShardIndex
from sd_perf.errors import DataError


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def part(index: ShardIndex, sample: int, name: str) -> bytes:
    row = index.samples[sample]
    data = (index.folder / index.shards[row["shard"]]).read_bytes()
    return data[row[f"{name}_offset"] :][: row[f"{name}_size"]]


def test_index_finds_every_part(make_shards):
    index = ShardIndex.open(make_shards(num=6).path, need_context=True)
    assert len(index) == 6 and index.shards == ["00000.tar", "00001.tar"]
    for i in range(6):
        assert part(index, i, "caption") == f"caption {i}".encode()
        assert (np.load(io.BytesIO(part(index, i, "moments"))) == i).all()
        assert (np.load(io.BytesIO(part(index, i, "context"))) == -i).all()
    assert index.name(4) == "000010000 in 00001.tar"


def test_shards_made_by_taring_a_folder(tmp_path):
    """The benchmark's converter writes a nameless directory entry, then sorted files."""
    source = tmp_path / "extracted"
    source.mkdir()
    for key in ("000310042", "000310007"):
        for extension in ("npy", "txt", "json"):
            (source / f"{key}.{extension}").write_text(f"{key} {extension}")
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards" / "00031.tar", "w") as tar:
        tar.add(source, arcname="")
    index = ShardIndex.open(tmp_path / "shards")
    assert index.samples["key"].tolist() == [b"000310007", b"000310042"]
    assert part(index, 1, "caption") == b"000310042 txt"


def test_keys_end_at_the_first_dot_of_the_base_name(tmp_path):
    files = [
        "v1.0/a.npy",
        "v1.0/a.TXT",
        "v1.0/b.context.npy",
        "v1.0/b.npy",
        "v1.0/b.txt",
        "v1.0/.hidden.npy",
    ]
    write_tar(tmp_path / "0.tar", [(name, name.encode()) for name in files])
    index = ShardIndex.open(tmp_path)
    assert index.samples["key"].tolist() == [b"v1.0/a", b"v1.0/b"]
    assert part(index, 1, "context") == b"v1.0/b.context.npy"
    assert part(index, 1, "moments") == b"v1.0/b.npy"
    assert index.samples["context_size"].tolist() == [0, 18]


def test_saved_index_is_reused_until_a_shard_changes(make_shards, monkeypatch):
    folder = Path(make_shards().path)
    built = ShardIndex.open(folder)
    calls = []
    scan = shards.scan_shard
    monkeypatch.setattr(shards, "scan_shard", lambda *a: calls.append(a) or scan(*a))
    assert (ShardIndex.open(folder).samples == built.samples).all() and not calls
    os.utime(folder / "00001.tar", ns=(1, 1))
    ShardIndex.open(folder)
    assert len(calls) == 3
    (folder / "00002.tar").unlink()
    assert len(ShardIndex.open(folder)) == 8 and len(calls) == 5


def test_processes_find_what_one_finds(make_shards, tmp_path):
    folder = make_shards(num=12).path
    one = ShardIndex.open(folder, tmp_path / "one.npz", processes=1)
    two = ShardIndex.open(folder, tmp_path / "two.npz", processes=2)
    assert (one.samples == two.samples).all() and one.samples.dtype == two.samples.dtype


def test_fingerprint_is_of_the_data_alone(make_shards):
    first, second = make_shards(name="a"), make_shards(name="elsewhere")
    os.utime(Path(second.path) / "00000.tar", ns=(1, 1))
    fingerprint = ShardIndex.open(first.path).fingerprint
    assert ShardIndex.open(second.path).fingerprint == fingerprint and len(fingerprint) == 64
    assert ShardIndex.open(make_shards(name="c", num=9).path).fingerprint != fingerprint
    (Path(second.path) / "00000.tar").rename(Path(second.path) / "00000b.tar")
    assert ShardIndex.open(second.path).fingerprint != fingerprint
    longer, renamed = (
        [("a.npy", b"1"), (f"{key}.txt", text)] for key, text in [("a", b"22"), ("b", b"2")]
    )
    renamed[0] = ("b.npy", b"1")
    base = write_tar(
        Path(first.path).parent / "d" / "0.tar", [("a.npy", b"1"), ("a.txt", b"2")]
    ).parent
    prints = {ShardIndex.open(base).fingerprint}
    for number, members in enumerate((longer, renamed)):
        folder = write_tar(base.with_name(f"e{number}") / "0.tar", members).parent
        prints.add(ShardIndex.open(folder).fingerprint)
    assert len(prints) == 3


@pytest.mark.parametrize(
    "cut", ["inside the last file", "before the end blocks", "between members", "inside a header"]
)
def test_truncated_tar(make_shards, cut):
    shard = Path(make_shards(num=4).path) / "00000.tar"
    with tarfile.open(shard) as tar:
        last, second = tar.getmembers()[-1], tar.getmembers()[5]
        end = tar.offset
    length = {
        "inside the last file": last.offset_data + 3,
        "before the end blocks": end,
        "between members": second.offset,
        "inside a header": second.offset + 100,
    }[cut]
    os.truncate(shard, length)
    with pytest.raises(DataError, match=r"00000\.tar .*(truncated|tar file).*again"):
        ShardIndex.open(shard.parent)
    assert names(shard.parent) == [shard.name, "SHA256SUMS"]


def test_damaged_header_is_not_taken_for_the_end(make_shards):
    shard = Path(make_shards(num=4).path) / "00000.tar"
    with tarfile.open(shard) as tar:
        offset = tar.getmembers()[5].offset
    with shard.open("r+b") as stream:
        stream.seek(offset)
        stream.write(b"\xff" * 512)
    with pytest.raises(DataError, match=f"damaged at byte {offset}"):
        ShardIndex.open(shard.parent)


def test_not_a_tar(tmp_path):
    (tmp_path / "0.tar").write_bytes(b"no tar " * 1000)
    with pytest.raises(DataError, match=r"0\.tar cannot be read as a tar file"):
        ShardIndex.open(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.npy", "a.txt", "b.txt"], "sample b has no .npy"),
        (["a.npy", "a.json"], "sample a has no .txt"),
        (["a.npy", "a.txt", "a.npy"], r"a\.npy occurs twice"),
        ([], "no samples"),
    ],
)
def test_unusable_members(tmp_path, files, message):
    write_tar(tmp_path / "7.tar", [(name, b"x") for name in files])
    with pytest.raises(DataError, match=message):
        ShardIndex.open(tmp_path)


def test_missing_context(make_shards):
    folder = make_shards(context=False).path
    assert len(ShardIndex.open(folder)) == 10
    with pytest.raises(
        DataError, match=r"10 samples have no text states, the first is 000000000 in 00000\.tar"
    ):
        ShardIndex.open(folder, need_context=True)


def test_unusable_folders(tmp_path):
    with pytest.raises(DataError, match="not a folder"):
        ShardIndex.open(tmp_path / "absent")
    with pytest.raises(DataError, match=r"is empty; data\.path"):
        ShardIndex.open(tmp_path)
    (tmp_path / "readme.txt").write_text("")
    with pytest.raises(DataError, match=r"holds no \*\.tar"):
        ShardIndex.open(tmp_path)


def test_unwritable_index_is_told_before_the_scan(make_shards, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "scan_shard", lambda *a: pytest.fail("scanned"))
    with pytest.raises(DataError, match=r"cannot be written .*set data\.index"):
        ShardIndex.open(make_shards().path, tmp_path / "no such folder" / "index.npz")


@pytest.mark.parametrize("content", [b"my novel", b"", b"PK\x03\x04 cut", "npy", "npz"])
def test_foreign_index_file_is_left_alone(make_shards, tmp_path, content):
    file = tmp_path / "precious"
    with file.open("wb") as stream:
        if content == "npy":
            np.save(stream, np.ones(3))
        elif content == "npz":
            np.savez(stream, mine=np.ones(3))
        else:
            stream.write(content)
    before = file.read_bytes()
    with pytest.raises(DataError, match=r"precious is not a shard index; .*data\.index"):
        ShardIndex.open(make_shards().path, file)
    assert file.read_bytes() == before


def test_the_half_behind_the_first_end_is_refused(make_shards):
    """`cat a.tar b.tar` makes a file of which tar readers see the first part."""
    folder = Path(make_shards(num=8).path)
    both = (folder / "00000.tar").read_bytes() + (folder / "00001.tar").read_bytes()
    (folder / "00000.tar").write_bytes(both)
    with pytest.raises(DataError, match=r"00000\.tar goes on behind the end .*cat"):
        ShardIndex.open(folder)
    padded = (folder / "00001.tar").read_bytes() + bytes(3 * 2**20 + 5)
    (folder / "00000.tar").write_bytes(padded)  # padding of any length is none
    assert len(ShardIndex.open(folder)) > 0


@pytest.mark.parametrize(
    "kind",
    [
        tarfile.LNKTYPE,
        tarfile.SYMTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
        tarfile.GNUTYPE_SPARSE,
    ],
)
def test_what_is_no_plain_file_is_refused(tmp_path, kind):
    path = write_tar(tmp_path / "0.tar", [("a.npy", b"1"), ("a.txt", b"2"), ("b.txt", b"2")])
    with tarfile.open(path, "a") as tar:
        member = tarfile.TarInfo("b.npy")
        member.type, member.linkname = kind, "a.npy"
        tar.addfile(member)
    with pytest.raises(DataError, match=r"0\.tar: b\.npy is a link, a device or a sparse file"):
        ShardIndex.open(tmp_path)


def test_a_hard_linked_folder_is_refused_and_its_advice_works(tmp_path):
    source = tmp_path / "extracted"
    source.mkdir()
    (tmp_path / "shards").mkdir()
    for name in ("a.npy", "a.txt"):
        (source / name).write_text(name)
    for name in ("b.npy", "b.txt"):
        os.link(source / f"a{name[1:]}", source / name)
    for option, count in (([], None), (["--dereference", "--hard-dereference"], 2)):
        command = ["tar", *option, "-C", source, "-cf", tmp_path / "shards" / "0.tar", "."]
        subprocess.run(command, check=True)
        if count is None:
            with pytest.raises(DataError, match="is a link"):
                ShardIndex.open(tmp_path / "shards")
        else:
            assert len(ShardIndex.open(tmp_path / "shards")) == count


def test_files_that_a_mac_adds(make_shards):
    folder = Path(make_shards(num=4).path)
    count = len(ShardIndex.open(folder))
    (folder / "._00000.tar").write_bytes(b"\0\x05\x16\x07 no tar")
    extra = [("d/._c.npy", b"x"), ("._c.txt", b"x"), ("d/c.npy", b"1"), ("d/c.txt", b"2")]
    write_tar(folder / "9.tar", extra)
    index = ShardIndex.open(folder)
    assert len(index) == count + 1 and "._00000.tar" not in index.shards
    assert index.samples["key"].tolist()[-1] == b"d/c"
