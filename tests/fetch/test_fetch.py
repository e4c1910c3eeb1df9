"""Whole artefacts: several files and sources, what is skipped, what is fetched again, what ends."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from sd_perf.errors import UserError
from sd_perf.fetch import download as download_module
from sd_perf.fetch.check import check
from sd_perf.fetch.download import DRAFTS
from sd_perf.fetch.fetch import locked
from sd_perf.fetch.manifest import File
from sd_perf.fetch.receipt import RECEIPT
from tests.fetch.conftest import DATA, OTHER, a_file, an_artefact, fetch, sha256
from tests.fetch.hostile_server import FAULTS
from tests.waiting import wait_for

NAMES = [f"{number:05}.tar" for number in range(8)]
SHARDS = {name: DATA[: 1000 * (number + 1)] for number, name in enumerate(NAMES)}


def a_set(**options):
    return an_artefact(*(a_file(name, data) for name, data in SHARDS.items()), **options)


def serve_set(server, folder="/d", **faults):
    """The shards below a folder, with `faults` of some by number; returns the folder's URL."""
    for number, (name, data) in enumerate(SHARDS.items()):
        server.serve(f"{folder}/{name}", data, *faults.get(f"n{number}", []))
    return f"{server.url}{folder}/"


def files_of(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != RECEIPT)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_a_set_of_files(server, tmp_path, impatient):
    impatient(silence=2)
    url = serve_set(server, n1=["cut"], n3=["503", "stall"], n5=["corrupt"])
    outcome = fetch(a_set(sources=(url,)), tmp_path)
    assert files_of(tmp_path) == SHARDS and sorted(outcome.fetched) == NAMES
    receipt = json.loads((tmp_path / RECEIPT).read_text())["files"]
    entry = receipt["00002.tar"]
    assert entry["url"] == url + "00002.tar" and entry["artefact"] == "things"
    assert entry["size"] == 3000 and entry["sha256"] == sha256(SHARDS["00002.tar"])
    assert entry["published"] == {"sha256": entry["sha256"]}
    assert not (tmp_path / DRAFTS).exists()


def test_the_receipt_keeps_no_signature(server, tmp_path):
    fetch(an_artefact(), tmp_path, server.serve("/file", DATA) + "?signature=secret")
    assert "secret" not in (tmp_path / RECEIPT).read_text()


def test_what_is_whole_is_skipped_and_what_is_not_is_fetched_again(server, tmp_path, capsys):
    artefact = a_set(sources=(serve_set(server),))
    fetch(artefact, tmp_path)
    server.log.clear()
    (tmp_path / "00001.tar").write_bytes(SHARDS["00001.tar"][:-1])
    damaged = bytearray(SHARDS["00004.tar"])
    damaged[7] ^= 1
    (tmp_path / "00004.tar").write_bytes(damaged)
    (tmp_path / "00006.tar").unlink()
    (tmp_path / RECEIPT).rename(tmp_path / "aside")
    outcome = fetch(artefact, tmp_path)
    assert sorted(outcome.fetched) == ["00001.tar", "00004.tar", "00006.tar"]
    assert len(outcome.present) == 5 and len(server.log) == 3
    (tmp_path / "aside").unlink()
    assert files_of(tmp_path) == SHARDS
    told = capsys.readouterr().out
    assert "00001.tar: is there, but it has 1,999 bytes, and not 2,000; it is fetched" in told
    assert "00004.tar: is there, but its SHA256 is not the published one; it is" in told
    assert "00000.tar: 1.0 kB, was there, SHA256 as published" in told


def test_no_source_is_asked_where_the_receipt_vouches_for_all(server, tmp_path, capsys):
    artefact = a_set(sources=(serve_set(server),))
    fetch(artefact, tmp_path)
    server.log.clear()
    capsys.readouterr()
    assert sorted(fetch(artefact, tmp_path).present) == NAMES
    assert not server.log and not capsys.readouterr().out
    assert fetch(a_set(), tmp_path, tmp_path / "absent").fetched == []


def test_three_damaged_in_a_row_end_it(server, tmp_path):
    url = serve_set(server)
    for name in NAMES[2:]:
        server.files[f"/d/{name}"].always = "corrupt"
    with pytest.raises(UserError, match=r"3 damaged files came in a row from .*make them yourself"):
        fetch(a_set(sources=(url,)), tmp_path, jobs=1)
    assert files_of(tmp_path) == {name: SHARDS[name] for name in NAMES[:2]}


def test_another_source_where_one_gives_damaged_files(server, tmp_path):
    """After the first damaged file the next source is asked first."""
    bad, good = serve_set(server, "/bad"), serve_set(server, "/good")
    for name in NAMES:
        server.files[f"/bad/{name}"].always = "corrupt"
    fetch(a_set(sources=(bad, good)), tmp_path, jobs=1)
    assert files_of(tmp_path) == SHARDS
    assert [path for path, _, _ in server.log if path.startswith("/bad")] == ["/bad/00000.tar"]


def test_sources_that_are_gone(server, tmp_path, capsys):
    gone = f"{server.url}/metadata/gone.uri"
    half = f"{server.url}/half/"
    for name in NAMES[:4]:
        server.serve(f"/half/{name}", SHARDS[name])
    outcome = fetch(a_set(sources=(gone, half, serve_set(server))), tmp_path)
    assert files_of(tmp_path) == SHARDS and not outcome.failed
    assert "gone.uri: 404 Not Found" in capsys.readouterr().out


def test_files_that_no_source_gives(server, tmp_path):
    """The others are fetched; three failures in a row end it."""
    url = serve_set(server)
    del server.files["/d/00003.tar"]
    outcome = fetch(a_set(sources=(url,)), tmp_path, jobs=1)
    assert len(outcome.fetched) == 7
    [sentence] = outcome.failed
    assert sentence == f"00003.tar: {url}00003.tar: 404 Not Found"
    server.files.clear()
    server.log.clear()
    with pytest.raises(UserError, match=r"3 files failed in a row, the last being 00002\.tar"):
        fetch(a_set(sources=(url,)), tmp_path / "again", jobs=1)
    assert len(server.log) == 3


def test_no_source_at_all(server, tmp_path):
    artefact = a_set(sources=(f"{server.url}/metadata/x.uri",))
    with pytest.raises(UserError, match=r"no source has it \(.*404.*\)\. What to do: make them"):
        fetch(artefact, tmp_path)
    with pytest.raises(UserError, match=r"things: no source has it.*Check what --from names"):
        fetch(artefact, tmp_path, tmp_path / "absent")


def test_from_replaces_the_sources(server, tmp_path):
    artefact = a_set(sources=(f"{server.url}/never/",))
    fetch(artefact, tmp_path / "a", serve_set(server))
    fetch(artefact, tmp_path / "b", tmp_path / "a")
    assert files_of(tmp_path / "b") == SHARDS
    assert not server.ranges("/never/00000.tar")
    (tmp_path / "a" / "00000.tar").write_bytes(SHARDS["00001.tar"][:1000][::-1])
    with pytest.raises(UserError, match="3 damaged files came in a row"):
        fetch(artefact, tmp_path / "c", tmp_path / "a", jobs=1)
    assert not files_of(tmp_path / "c")


def test_files_without_a_digest(server, tmp_path, capsys):
    """They must begin as they should; what is there already is not replaced."""
    artefact = an_artefact(File("a.parquet", starts=b"PAR1"), File("b.parquet", starts=b"PAR1"))
    server.serve("/d/a.parquet", b"PAR1 one PAR1")
    server.serve("/d/b.parquet", b"PAR1 two PAR1", "captive")
    fetch(artefact, tmp_path, f"{server.url}/d/")
    told = capsys.readouterr().out
    assert "a.parquet: 13 bytes, not verified: no digest is known" in told
    assert "b.parquet: arrived damaged" in told and "does not begin with 'PAR1'" in told
    (tmp_path / RECEIPT).unlink()
    (tmp_path / "a.parquet").write_bytes(b"PAR1 mine PAR1")
    assert fetch(artefact, tmp_path, f"{server.url}/d/").fetched == []
    assert (tmp_path / "a.parquet").read_bytes() == b"PAR1 mine PAR1"


def test_a_full_disk_and_then_room(server, tmp_path, monkeypatch):
    url = server.serve("/file", DATA)
    real = download_module._write

    def fills_up(target, chunk):
        real(target, chunk[:1000])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download_module, "_write", fills_up)
    with pytest.raises(UserError, match=r"cannot be written \(No space left.*goes on from what is"):
        fetch(an_artefact(sources=(url,)), tmp_path)
    assert list(files_of(tmp_path)) and not (tmp_path / "file").exists()
    monkeypatch.setattr(download_module, "_write", real)
    fetch(an_artefact(sources=(url,)), tmp_path)
    assert files_of(tmp_path) == {"file": DATA}
    assert server.ranges("/file") == [None, "bytes=1000-"]


def test_a_disk_that_is_too_small(server, mount_tmpfs):
    folder = mount_tmpfs("size=100k")
    url = server.serve("/file", DATA)
    with pytest.raises(UserError, match=r"200,000 bytes are needed and \d+,\d+ are free"):
        fetch(an_artefact(sources=(url,)), folder)
    assert not server.log


def test_a_draft_that_was_not_looked_at(server, tmp_path):
    """Killed between the last byte and the comparison."""
    artefact = an_artefact(sources=(server.serve("/file", DATA, "cut", always="404"),))
    assert fetch(artefact, tmp_path).failed
    with (tmp_path / DRAFTS / "file.part").open("ab") as file:
        file.write(DATA[len(DATA) // 2 :])
    assert fetch(artefact, tmp_path).fetched == ["file"]
    assert files_of(tmp_path) == {"file": DATA}


def test_check(server, tmp_path):
    artefact = a_set(sources=(serve_set(server),))
    fetch(artefact, tmp_path)
    assert set(check(artefact, tmp_path, 2)) == {(name, "") for name in NAMES}
    times = (tmp_path / "00002.tar").stat()
    data = bytearray(SHARDS["00002.tar"])
    data[-1] ^= 1
    (tmp_path / "00002.tar").write_bytes(data)
    os.utime(tmp_path / "00002.tar", ns=(times.st_atime_ns, times.st_mtime_ns))
    (tmp_path / "00005.tar").unlink()
    assert fetch(a_set(), tmp_path, serve_set(server)).fetched == ["00005.tar"]  # it sees no more
    (tmp_path / "00005.tar").unlink()
    found = dict(check(artefact, tmp_path, 2))
    assert found["00002.tar"] == "its SHA256 is not the published one"
    assert found["00005.tar"] == "is not there" and found["00000.tar"] == ""
    assert sorted(fetch(artefact, tmp_path).fetched) == ["00002.tar", "00005.tar"]


def test_check_with_an_algorithm_that_nobody_knows(tmp_path):
    (tmp_path / "file").write_bytes(DATA)
    entry = {"artefact": "things", "url": None, "size": len(DATA), "modified_ns": 0, "time": ""}
    entry |= {"sha256": sha256(DATA), "published": {"sha3000": "00"}}
    (tmp_path / RECEIPT).write_text(json.dumps({"files": {"file": entry}}))
    assert list(check(an_artefact(), tmp_path, 1)) == [("file", "")]


def test_check_of_what_nothing_is_known_of(tmp_path):
    (tmp_path / "a").touch()
    artefact = an_artefact(File("a"))
    assert list(check(artefact, tmp_path, 1)) == [
        ("a", "cannot be checked: no digest is known of it")
    ]


@pytest.mark.parametrize("content", ["{", "[]", '{"files": {"a": {"size": "x"}}}'])
def test_a_damaged_receipt(content, tmp_path):
    (tmp_path / RECEIPT).write_text(content)
    with pytest.raises(UserError, match=RECEIPT):
        fetch(an_artefact(), tmp_path, tmp_path)


def test_one_fetch_per_folder(tmp_path):
    with (
        locked(tmp_path),
        pytest.raises(UserError, match="another sd-perf fetch"),
        locked(tmp_path),
    ):
        pass
    with locked(tmp_path):
        pass
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another --output-dir"), locked(tmp_path / "file"):
        pass


def test_a_folder_on_the_way_of_a_file(server, tmp_path):
    (tmp_path / "file").mkdir()
    url = server.serve("/file", DATA)
    with pytest.raises(UserError, match=r"cannot be written \(Is a directory"):
        fetch(an_artefact(sources=(url,)), tmp_path)


CHILD = """
import sys
from pathlib import Path
from tests.fetch.conftest import an_artefact, fetch
fetch(an_artefact(), Path(sys.argv[2]), sys.argv[1])
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_half_way(number, server, tmp_path):
    url = server.serve("/file", DATA, "stall")
    command = [sys.executable, "-c", CHILD, url, str(tmp_path)]
    part = tmp_path / DRAFTS / "file.part"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as child:
        wait_for(lambda: part.exists() and part.stat().st_size == len(DATA) // 2)
        child.send_signal(number)
    assert not (tmp_path / "file").exists() and part.stat().st_size == len(DATA) // 2
    server.serve("/file", DATA)
    fetch(an_artefact(), tmp_path, url)
    assert files_of(tmp_path) == {"file": DATA}
    assert server.ranges("/file") == [None, f"bytes={len(DATA) // 2}-"]


@pytest.mark.parametrize("seed", range(12))
def test_any_faults_in_any_order(seed, server, tmp_path):
    """Whatever happens, no name ever has other bytes than it should."""
    dice = random.Random(seed)
    kinds = [kind for kind in FAULTS if kind not in ("drip", "stall")]
    url = serve_set(server)
    for name in NAMES:
        served = server.files[f"/d/{name}"]
        served.later, served.weak = served.data, bool(dice.randrange(2))
        served.faults = dice.choices(kinds, k=dice.randrange(5))
    for _ in range(40):
        with contextlib.suppress(UserError):
            fetch(a_set(sources=(url, url)), tmp_path, jobs=3)
        found = {name: data for name, data in files_of(tmp_path).items() if DRAFTS not in name}
        assert found.items() <= SHARDS.items()
        if found == SHARDS:
            break
    assert files_of(tmp_path) == SHARDS


def asked_or_ended(server, before: int, child: subprocess.Popen) -> bool:
    """Whether a server has had more requests than before, or their sender has ended."""
    return len(server.log) > before or child.poll() is not None


@pytest.mark.slow
def test_killed_at_any_moment(server, tmp_path):
    """Twenty times in a download; what has a name is whole each time, and in the end all have."""
    url = server.serve("/file", DATA, always="drip_fast")
    command = [sys.executable, "-c", CHILD, url, str(tmp_path)]
    dice = random.Random(3)
    for _ in range(20):
        before = len(server.log)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as child:
            wait_for(partial(asked_or_ended, server, before, child))
            time.sleep(dice.uniform(0, 0.5))
            child.kill()
        found = {name: data for name, data in files_of(tmp_path).items() if DRAFTS not in name}
        assert found in ({}, {"file": DATA})
    fetch(an_artefact(), tmp_path, url)
    assert files_of(tmp_path) == {"file": DATA}
    starts = [int(wanted[6:-1]) for wanted in server.ranges("/file") if wanted]
    assert starts == sorted(starts) and starts[-1] > 0  # it never lost what it had


def test_a_killed_fetch_of_a_file_that_has_changed(server, tmp_path):
    """What is kept of the old file does not get into the new one."""
    artefact = an_artefact(File("file"))
    url = server.serve("/file", OTHER, "cut", always="404")
    assert fetch(artefact, tmp_path, url).failed
    server.serve("/file", DATA)
    fetch(artefact, tmp_path, url)
    assert files_of(tmp_path) == {"file": DATA}
