"""Zip archives: into their folder and nowhere else."""

from __future__ import annotations

import stat
import zipfile

import pytest

from sd_perf.console import TextConsole
from sd_perf.errors import UserError
from sd_perf.fetch import unpack as module
from sd_perf.fetch.progress import Watch
from tests.fetch.conftest import DATA, a_file, an_artefact, fetch

MEMBERS = {"val/a.jpg": b"aaaa" * 1000, "val/deep/b.jpg": DATA}


def write_zip(path, members, mode=stat.S_IFREG | 0o644):
    with zipfile.ZipFile(path, "w") as file:
        file.mkdir("val")
        for name, data in members:
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            file.writestr(info, data)


@pytest.fixture
def unpack(tmp_path):
    """unpack() of tmp_path/x.zip into tmp_path/out -> the files in it"""

    def call():
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        module.unpack(tmp_path / "x.zip", out, tmp_path / "drafts", Watch(TextConsole()))
        return {
            str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()
        }

    return call


def test_what_is_lacking_is_unpacked(unpack, tmp_path, capsys):
    write_zip(tmp_path / "x.zip", MEMBERS.items())
    assert unpack() == MEMBERS
    (tmp_path / "out/val/a.jpg").write_bytes(b"aaab" * 1000)
    capsys.readouterr()
    assert unpack() == MEMBERS
    assert capsys.readouterr().out == "x.zip: 204.0 kB, 1 of 2 files unpacked\n"
    assert unpack() == MEMBERS


@pytest.mark.parametrize(
    ("members", "mode", "reason"),
    [
        ([("../a", b"")], stat.S_IFREG, "names '../a', which is no file of the folder"),
        ([("/etc/a", b"")], stat.S_IFREG, "names '/etc/a'"),
        ([("val/../../a", b"")], stat.S_IFREG, "no file of the folder"),
        ([("val/a\x1b", b"")], stat.S_IFREG, "no file of the folder"),
        ([("val/a", b"/etc/passwd")], stat.S_IFLNK, "is a link or a device"),
        ([("val/a", b""), ("val/a", b"x")], stat.S_IFREG, "has a member twice"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_refused_before_anything_is_unpacked(members, mode, reason, unpack, tmp_path):
    write_zip(tmp_path / "x.zip", members, mode)
    with pytest.raises(UserError, match=reason):
        unpack()
    assert not list((tmp_path / "out").iterdir())


def test_a_damaged_archive(unpack, tmp_path):
    write_zip(tmp_path / "x.zip", MEMBERS.items())
    data = bytearray((tmp_path / "x.zip").read_bytes())
    data[data.index(DATA[:50]) + 7] ^= 1
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(UserError, match=r"cannot be unpacked \(Bad CRC-32"):
        unpack()
    assert not (tmp_path / "out/val/deep/b.jpg").exists()
    (tmp_path / "x.zip").write_bytes(data[:1000])
    with pytest.raises(UserError, match=r"cannot be unpacked \(File is not a zip"):
        unpack()


def test_room_is_asked_for(unpack, tmp_path, monkeypatch):
    write_zip(tmp_path / "x.zip", MEMBERS.items())
    free = type("", (), {"free": 1000})
    monkeypatch.setattr("sd_perf.fetch.download.shutil.disk_usage", lambda path: free)
    with pytest.raises(UserError, match="204,000 bytes are needed"):
        unpack()


def test_an_artefact_that_is_unpacked(server, tmp_path):
    write_zip(tmp_path / "x.zip", MEMBERS.items())
    data = (tmp_path / "x.zip").read_bytes()
    artefact = an_artefact(a_file("x.zip", data), unpack=True)
    url = server.serve("/x.zip", data)
    for _ in range(2):
        fetch(artefact, tmp_path / "out", url)
        assert (tmp_path / "out/val/deep/b.jpg").read_bytes() == DATA
    assert len(server.log) == 1 and not (tmp_path / "out/.sd_perf_fetch").exists()
