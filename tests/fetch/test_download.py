"""One file from a server that misbehaves: whole in the end, or refused in words; never wrong."""

from __future__ import annotations

import os
import subprocess

import pytest

from sd_perf.errors import UserError
from sd_perf.fetch import download as module
from sd_perf.fetch.download import Draft, copy, download
from sd_perf.fetch.manifest import File
from sd_perf.fetch.web import Ended, Refused, Web
from tests.fetch.conftest import DATA, OTHER, a_file
from tests.fetch.hostile_server import Served

HALF, QUARTER = len(DATA) // 2, len(DATA) // 4
REST = f"bytes={HALF}-"
UNKNOWN = File("file")
"""neither size nor digest are published"""


@pytest.fixture
def draft(tmp_path):
    return Draft(tmp_path, "file")


def get(url, draft, file=None):
    """Download to the draft; returns its bytes."""
    download(Web(), url, file or a_file(), draft, lambda have, total: None)
    return draft.path.read_bytes()


@pytest.mark.parametrize(
    ("faults", "ranges"),
    [
        ([], [None]),
        (["cut"], [None, REST]),
        (["cut", "cut"], [None, REST, f"bytes={HALF + QUARTER}-"]),
        (["stall"], [None, REST]),
        (["cut_at_once", "cut_at_once"], [None, None, None]),
        (["503", "500", "cut", "429", "nonsense_after"], [None, None, None, REST, REST, REST]),
        (["cut", "no_range"], [None, REST]),
        (["cut", "other_range"], [None, REST, None]),
        (["cut", "416"], [None, REST, None]),
        (["no_range_cut", "no_range_cut"], [None, REST, REST]),
    ],
)
@pytest.mark.parametrize("file", [a_file(), UNKNOWN], ids=["published", "unknown"])
def test_whole_in_the_end(faults, ranges, file, server, draft, impatient):
    if "stall" in faults:
        impatient(silence=2)
    url = server.serve("/file", DATA, *faults)
    assert get(url, draft, file) == DATA
    assert server.ranges("/file") == ranges


def test_many_cuts_that_each_bring_something(server, draft):
    """More of them than the attempts that may bring nothing."""
    assert get(server.serve("/file", DATA, *["cut"] * 6), draft) == DATA


def test_a_redirect_is_followed_with_the_range(server, draft):
    server.serve("/file", DATA, "cut")
    url = server.serve("/elsewhere", b"", always="to_file")
    assert get(url, draft) == DATA
    assert server.ranges("/file") == [None, REST]


@pytest.mark.parametrize("later", ["changed", "changed_unasked"])
def test_a_file_that_changes_between_attempts(later, server, draft):
    """Nothing of the first one is in the result, whether or not the server heeds If-Range."""
    url = server.serve("/file", DATA, "cut", later, later=OTHER)
    assert get(url, draft, UNKNOWN) == OTHER
    assert server.log[1][2] is not None


def test_with_a_weak_validator_only_a_digest_allows_to_go_on(server, draft):
    assert get(server.serve("/file", DATA, "cut", weak=True), draft) == DATA
    assert server.log[-1] == ("/file", REST, None)
    draft.discard()
    assert get(server.serve("/file", DATA, "cut", weak=True), draft, UNKNOWN) == DATA
    assert server.log[-1] == ("/file", None, None)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("404", "404 Not Found"),
        ("500", "500 Internal Server Error, 3 times in a row"),
        ("cut_at_once", "3 times in a row"),
        ("drip", r"only \d+ bytes came in"),
        ("shorter", "its file has 100,000 bytes, and not 200,000"),
        ("longer", "its file has 200,100 bytes, and not 200,000"),
        ("captive", "its file has 26 bytes"),
        ("too_much", "sends more than the 200,000 bytes that it promised, 3 times in a row"),
        ("gzip", r"compressed \(gzip\)"),
        ("come_tomorrow", "asks for a wait of 21,600 s or more"),
        ("to_itself", "redirects to itself"),
        ("in_a_circle", "redirects more than 5 times"),
        ("to_ftp", "redirects from http to ftp:.*another scheme"),
        ("to_https", "redirects from http to https:.*another scheme"),
        ("to_disk", "redirects from http to file:.*another scheme"),
        ("to_nowhere", "redirects to what is no URL"),
    ],
)
def test_refused_in_words(fault, reason, server, draft, impatient):
    if fault == "drip":
        impatient(window=0.3)
    with pytest.raises(Refused, match=reason):
        get(server.serve("/file", DATA, always=fault), draft)


@pytest.mark.parametrize("fault", ["no_length", "too_much"])
def test_what_does_not_say_its_length(fault, server, draft):
    """It is taken where the size is published, and only there."""
    url = server.serve("/file", DATA, fault)
    with pytest.raises(Refused, match="does not say how long"):
        get(url, draft, UNKNOWN)
    assert get(server.serve("/file", DATA, "no_length"), draft) == DATA


def test_what_promises_more_than_it_sends(server, draft):
    """Where no size is published, it is never taken for whole."""
    with pytest.raises(Refused, match="3 times in a row"):
        get(server.serve("/file", DATA, always="longer"), draft, UNKNOWN)


def test_more_than_is_left(server, draft):
    """The draft is begun anew, and no byte beyond the end is kept."""
    url = server.serve("/file", DATA, "cut", "too_much")
    assert get(url, draft) == DATA
    assert server.ranges("/file") == [None, REST, None]


def test_through_a_proxy(server, draft, monkeypatch):
    server.serve("/", b"")
    server.files["http://elsewhere.invalid/file"] = Served(DATA, ["cut"])
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.setenv("no_proxy", "near.invalid")
    assert get("http://elsewhere.invalid/file", draft) == DATA
    with pytest.raises(Refused, match="its name is not found"):
        get("http://near.invalid/file", draft, File("other"))


def test_a_certificate_that_nobody_vouches_for(server, draft, tmp_path):
    """It is not asked again, and nothing is taken from it."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = f"openssl req -x509 -nodes -newkey rsa:2048 -subj /CN=x -keyout {key}"
    made = subprocess.run([*command.split(), "-out", certificate], capture_output=True)
    if made.returncode:
        pytest.skip(f"openssl cannot make a certificate: {made.stderr!r}")
    server.encrypt(key, certificate)
    server.serve("/file", DATA)
    with pytest.raises(Refused, match="its certificate is not valid"):
        get(server.url.replace("http:", "https:") + "/file", draft)
    assert not server.log and draft.size == 0


def test_nobody_there(draft):
    with pytest.raises(Refused, match=r"connection failed .*refused.*3 times in a row"):
        get("http://127.0.0.1:9/file", draft)


def test_a_draft_of_a_killed_process_is_gone_on_with(server, draft):
    url = server.serve("/file", DATA, "cut", always="404")
    with pytest.raises(Refused):
        get(url, draft)
    assert draft.size == HALF
    server.files["/file"].always = "good"
    assert get(url, Draft(draft.folder, "file")) == DATA
    assert server.ranges("/file")[-1] == REST
    # whole, but killed before it was looked at: nothing is asked for
    asked = len(server.log)
    assert get(url, draft, UNKNOWN) == DATA and len(server.log) == asked


def test_a_draft_is_gone_on_with_from_a_mirror(server, draft):
    """If a digest is known; else bytes of two places are never put together."""
    with pytest.raises(Refused):
        get(server.serve("/file", DATA, "cut", always="404"), draft)
    assert get(server.serve("/mirror", DATA), draft) == DATA
    assert server.ranges("/mirror") == [REST]
    draft.discard()
    with pytest.raises(Refused):
        get(server.serve("/file", OTHER, "cut", always="404"), draft, UNKNOWN)
    assert get(server.serve("/mirror2", DATA), draft, UNKNOWN) == DATA
    assert server.ranges("/mirror2") == [None]


@pytest.mark.parametrize("content", [b"", b"{", b'{"url": 1}', b"[" * 9999])
def test_a_damaged_note_begins_anew(content, server, draft):
    url = server.serve("/file", DATA, "cut", always="404")
    with pytest.raises(Refused):
        get(url, draft)
    draft.path.with_name("file.part.json").write_bytes(content)
    server.serve("/file", DATA)
    assert get(url, draft) == DATA
    assert server.ranges("/file")[-1] is None


def test_room_is_asked_for_before_a_byte_is_written(server, draft, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: type("", (), {"free": 1000}))
    with pytest.raises(UserError, match="200,000 bytes are needed and 1,000 are free"):
        get(server.serve("/file", DATA), draft)
    assert draft.size == 0


def test_a_stop_ends_waiting_and_reading(server, draft):
    web = Web()
    web.ended.set()
    with pytest.raises(Ended):
        download(web, server.serve("/file", DATA, "503"), a_file(), draft, lambda *_: None)
    with pytest.raises(Ended):
        download(web, server.serve("/file", DATA), a_file(), draft, lambda *_: None)


def test_a_copy_on_this_machine(draft, tmp_path):
    (tmp_path / "there").write_bytes(DATA)
    copy(Web(), tmp_path / "there", a_file(), draft, lambda *_: None)
    assert draft.path.read_bytes() == DATA
    with pytest.raises(Refused, match="No such file"):
        copy(Web(), tmp_path / "absent", a_file(), draft, lambda *_: None)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(Refused, match="is no regular file"):
        copy(Web(), tmp_path / "pipe", UNKNOWN, draft, lambda *_: None)
    with pytest.raises(Refused, match="has 200,000 bytes, and not 3"):
        copy(Web(), tmp_path / "there", a_file(data=b"abc"), draft, lambda *_: None)
