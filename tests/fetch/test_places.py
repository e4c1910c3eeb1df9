"""Where the files of an artefact are, by kind of source."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from sd_perf.errors import UserError
from sd_perf.fetch.manifest import File
from sd_perf.fetch.places import locate, origin
from sd_perf.fetch.web import Refused, Web
from tests.fetch.conftest import DATA, a_file, an_artefact

MD5 = hashlib.md5(DATA).hexdigest()
TWO = an_artefact(File("a.tar"), File("b.tar", path="else/b.tar"), sums="sums.txt")


def places(artefact, source, named=True):
    """name -> (where, digests)"""
    found = locate(artefact, source, Web(), named=named)
    return {place.file.name: (place.where, place.file.digests) for place in found}


def listed(server, *lines, base="/data/set"):
    """A folder of MLCommons' storage; returns the URL of its .uri file."""
    server.serve("/metadata/set.md5", "".join(f"{line}\n" for line in lines).encode())
    return server.serve("/metadata/set.uri", f"{server.url}{base}\n".encode())


def test_a_folder_of_mlcommons(server):
    url = listed(server, f"{MD5}  ./b.tar", f"{MD5}  a.tar", f"{MD5}  extra dir/x#1.txt")
    assert places(TWO, url) == {
        "a.tar": (f"{server.url}/data/set/a.tar", {"md5": MD5}),
        "b.tar": (f"{server.url}/data/set/b.tar", {"md5": MD5}),
        "extra dir/x#1.txt": (f"{server.url}/data/set/extra%20dir/x%231.txt", {"md5": MD5}),
    }


def test_published_digests_and_those_of_the_list(server):
    [(_, digests)] = places(an_artefact(a_file("a")), listed(server, f"{MD5}  a")).values()
    assert digests == {"md5": MD5, **a_file().digests}


@pytest.mark.parametrize(
    ("uri", "lines", "reason"),
    [
        (b"https://127.0.0.1/data", [f"{MD5}  a.tar"], "holds no URL of http://"),
        (b"<html> a page", [], "holds no URL"),
        (b"x" * 5000, [], "more than 4,096 bytes"),
        (b"\xff", [], "no text in UTF-8"),
        (None, [f"{MD5}  a.tar"], "lacks 1 of the 2 files of things, such as b.tar"),
        (None, ["<html>"], "line 1 is no digest"),
        (None, [f"{MD5}  ../a.tar"], "line 1 names '../a.tar'"),
    ],
)
def test_a_folder_that_is_refused(uri, lines, reason, server):
    url = listed(server, *lines)
    if uri is not None:
        server.serve("/metadata/set.uri", uri)
    with pytest.raises(Refused, match=reason):
        places(TWO, url)


def test_a_folder_behind_a_login(server):
    """Nothing is followed away from a list of digests."""
    url = listed(server, f"{MD5}  a.tar", f"{MD5}  b.tar")
    server.files["/metadata/set.uri"].always = "to_file"
    with pytest.raises(
        Refused, match=r"redirects to .*/file, and a list is not looked for elsewhere"
    ):
        places(TWO, url)


def test_a_list_is_asked_for_again(server):
    url = listed(server, f"{MD5}  a.tar", f"{MD5}  b.tar")
    server.files["/metadata/set.uri"].faults = ["503", "cut"]
    server.files["/metadata/set.md5"].faults = ["500"]
    assert set(places(TWO, url)) == {"a.tar", "b.tar"}
    server.files["/metadata/set.md5"].always = "500"
    with pytest.raises(Refused, match=r"set.md5: 500 .*3 times in a row"):
        places(TWO, url)


def test_a_folder_of_files(server):
    server.serve("/d/sums.txt", f"{MD5}  a.tar\n".encode())
    assert places(TWO, f"{server.url}/d/", named=False) == {
        "a.tar": (f"{server.url}/d/a.tar", {"md5": MD5}),
        "b.tar": (f"{server.url}/d/else/b.tar", {}),
    }
    assert places(TWO, f"{server.url}/e/") == {
        "a.tar": (f"{server.url}/e/a.tar", {}),
        "b.tar": (f"{server.url}/e/b.tar", {}),
    }


def test_one_file(server):
    assert places(an_artefact(), f"{server.url}/x?y") == {
        "file": (f"{server.url}/x?y", a_file().digests)
    }
    with pytest.raises(Refused, match=r"x.tar is one file, and things has 2"):
        places(TWO, f"{server.url}/x.tar")


def test_a_folder_on_this_machine(tmp_path):
    (tmp_path / "a.tar").touch()
    with pytest.raises(Refused, match="lacks 1 of the 2 files"):
        places(TWO, tmp_path)
    (tmp_path / "b.tar").touch()
    (tmp_path / "sums.txt").write_text(f"{MD5}  b.tar")
    assert places(TWO, tmp_path) == {
        "a.tar": (tmp_path / "a.tar", {}),
        "b.tar": (tmp_path / "b.tar", {"md5": MD5}),
    }
    assert places(an_artefact(), tmp_path / "mine.ckpt")["file"][0] == tmp_path / "mine.ckpt"
    with pytest.raises(Refused, match="one file"):
        places(TWO, tmp_path / "a.tar")


def test_what_from_names():
    with pytest.raises(UserError, match="names and passwords in a URL are not sent"):
        origin("https://me:secret@host/a")
    assert origin("https://host/a") == "https://host/a"
    assert origin("some/folder") == Path("some/folder")
    for text in ("", "ftp://host/a", "file:///etc", "s3://bucket/a", "http://", "http://[/"):
        with pytest.raises(UserError, match="neither a path nor a URL"):
            origin(text)
