"""sources.yaml holds what it promises, and lists of digests are read with suspicion."""

from __future__ import annotations

import datetime
import re
from urllib.parse import urlsplit

import pytest

from sd_perf.errors import UserError
from sd_perf.fetch.manifest import artefact_named, artefacts, digests_listed

MD5 = "0" * 32
LENGTHS = {"md5": 32, "sha1": 40, "sha256": 64, "sha512": 128}


@pytest.mark.parametrize("artefact", artefacts().values(), ids=lambda artefact: artefact.name)
def test_what_is_said_of_an_artefact(artefact):
    assert artefact.holds and artefact.terms and artefact.otherwise and artefact.sources
    assert re.fullmatch(r"[a-z0-9-]+", artefact.name)
    for file in artefact.files:
        for algorithm, digest in file.digests.items():
            assert re.fullmatch(r"[0-9a-f]+", digest) and len(digest) == LENGTHS[algorithm]
    for source in artefact.sources:
        assert urlsplit(source.url).scheme == "https" or all(f.digests for f in artefact.files)
        assert source.url.endswith((".uri", "/")) or len(artefact.files) == 1
        assert "@" not in source.url and "?" not in source.url  # no keys
        assert isinstance(source.seen or source.gone or datetime.date.today(), datetime.date)
    assert artefact.sources[0].seen or artefact.name == "laion400m-metadata"
    assert all(source.gone is None for source in artefact.sources[:-1])


def test_the_shards_of_the_benchmark():
    files = artefact_named("laion400m-moments").files
    assert [file.name for file in files] == [f"{number:05}.tar" for number in range(832)]
    assert len(artefact_named("laion400m-metadata").files) == 32
    assert artefact_named("coco2014-validation").size == 6_645_013_297 + 252_872_794


def test_a_name_that_there_is_not():
    with pytest.raises(UserError, match="did you mean inception"):
        artefact_named("incepton")
    with pytest.raises(UserError, match="there are laion400m-moments, "):
        artefact_named("\x1b[31m")


def test_a_list_of_digests():
    text = f"{MD5}  ./a.tar\n{'A' * 64} *b/c d.tar\r\n\n{'1' * 128}\ta.tar\n"
    assert digests_listed(text, "list") == {
        "a.tar": {"md5": MD5, "sha512": "1" * 128},
        "b/c d.tar": {"sha256": "a" * 64},
    }


@pytest.mark.parametrize(
    "line",
    [
        "<html>",
        "0" * 31 + "  a",
        "0" * 33 + "  a",
        MD5,
        *(
            f"{MD5}  {name}"
            for name in (
                "../a",
                "a/../../b",
                "/etc/passwd",
                "a//b",
                ".bashrc",
                ".sd_perf_fetch/a",
                "a\x1b[31m",
                "a\\b",
                "a/./b",
                "x" * 256,
                "a/",
            )
        ),
    ],
)
def test_a_list_that_is_refused(line):
    with pytest.raises(UserError, match="list: line 2 "):
        digests_listed(f"{MD5}  good\n{line}\n", "list")
