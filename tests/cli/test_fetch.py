"""`sd-perf fetch`: what it prints, what it refuses, and its exit codes."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys

import pytest

from sd_perf.fetch import web
from sd_perf.fetch.download import DRAFTS
from sd_perf.fetch.manifest import artefacts
from tests.cli.bad_input import matches
from tests.fetch.conftest import DATA, QUICK
from tests.fetch.hostile_server import hostile_server
from tests.waiting import PATIENCE, wait_for

PROMPTS = b"image_id\tid\tcaption\n1\t2\ta cat\n"


@pytest.fixture
def server():
    with hostile_server() as hostile:
        yield hostile


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(web, "PATIENCE", QUICK)


def serve_prompts(server, *faults):
    """The prompts as MLCommons serves them; returns the URL of the .uri file."""
    server.serve("/data/val2014_30k.tsv", PROMPTS, *faults)
    digest = hashlib.md5(PROMPTS).hexdigest()
    server.serve("/metadata/x.md5", f"{digest}  ./val2014_30k.tsv\n".encode())
    return server.serve("/metadata/x.uri", f"{server.url}/data\n".encode())


def test_the_list(sd_perf):
    code, output, _ = sd_perf("fetch")
    assert code == 0
    for artefact in artefacts().values():
        assert artefact.name in output


@pytest.mark.parametrize("name", artefacts())
def test_a_dry_run_tells_terms_and_sources(name, sd_perf, tmp_path):
    code, output, _ = sd_perf("fetch", name, "--dry-run", "--output-dir", tmp_path / "a/b")
    assert code == 0 and not list(tmp_path.iterdir())
    artefact = artefacts()[name]
    matches(output, artefact.terms, artefact.otherwise, *(s.url for s in artefact.sources))
    assert ("gone since" in output) == any(source.gone for source in artefact.sources)


@pytest.mark.parametrize(
    "options",
    [["-o", "a b"], ["--output-dir=a b"], ["-d", "a b"], ["--download-path", "a b"]],
)
def test_every_style_of_the_folder(options, sd_perf):
    """Behind another, as the scripts pass on what they are given."""
    code, output, _ = sd_perf("fetch", "clip", "--output-dir", "x", "--dry-run", *options)
    assert code == 0 and output.splitlines()[-1].startswith("folder: a b, ")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["stable-difusion", "-o", "x"], ["did you mean stable-diffusion"]),
        (["inception"], ["inception: --output-dir is missing"]),
        (["inception", "-o", "x", "--jobs", "0"], ["--jobs: 0 cannot be used"]),
        (["inception", "-o", "x", "--from", "ftp://h/a"], ["--from 'ftp://h/a' is neither"]),
        (
            ["inception", "-o", "x", "--from", "absent.pth"],
            ["absent.pth: it cannot be read"],
        ),
        (["laion400m-metadata", "-o", "x", "--from", "a.parquet"], ["a.parquet is one file"]),
        (["inception", "-o", "x", "--check"], ["x: no such folder"]),
        (["inception", "-o", "file/x"], ["file/x cannot be written (Not a directory)"]),
        (["clip", "-o", "x", "--from", "file"], ["its file has 0 bytes, and not 3,944,692,325"]),
    ],
)
def test_refused(arguments, parts, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    matches(refused("fetch", *arguments), *parts)


def test_from_a_mirror_of_mlcommons(sd_perf, server, tmp_path):
    url = serve_prompts(server, "cut", "corrupt")
    code, output, errors = sd_perf("fetch", "coco2014-prompts", "-o", tmp_path, "--from", url)
    assert code == 0 and not errors
    assert (tmp_path / "val2014_30k.tsv").read_bytes() == PROMPTS
    lines = output.splitlines()
    assert lines[1] == "terms: COCO's annotations are CC BY 4.0"
    assert lines[-2:] == [
        "val2014_30k.tsv: 30 bytes, MD5 as published",
        f"1 file -> {tmp_path}",
    ]
    again = sd_perf("fetch", "coco2014-prompts", "-o", tmp_path, "--from", url)[1]
    assert again.splitlines()[-1] == f"1 file, all of which were there -> {tmp_path}"


def test_check(sd_perf, server, tmp_path):
    command = ("fetch", "coco2014-prompts", "--output-dir", tmp_path)
    sd_perf(*command, "--from", serve_prompts(server))
    assert sd_perf(*command, "--check") == (0, "val2014_30k.tsv: good\n", "")
    (tmp_path / "val2014_30k.tsv").write_bytes(PROMPTS[::-1])
    code, output, _ = sd_perf(*command, "--check")
    assert code == 1
    matches(output, "val2014_30k.tsv: its ", " is not the published one")


def test_a_source_that_has_it_not(refused, server, tmp_path):
    url = serve_prompts(server)
    del server.files["/data/val2014_30k.tsv"]
    command = ("fetch", "coco2014-prompts", "-o", tmp_path, "--from", url)
    matches(refused(*command), "could not be fetched: val2014_30k.tsv", "404", "what --from names")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_keeps_what_came(number, code, server, tmp_path):
    server.serve("/clip.bin", DATA, always="stall")
    program = f"""
import dataclasses
from sd_perf.cli import main
from sd_perf.fetch import manifest
clip = manifest.artefacts()["clip"]
file = dataclasses.replace(clip.files[0], size={len(DATA)})
manifest.artefacts()["clip"] = dataclasses.replace(clip, files=(file,))
main()
"""
    command = [sys.executable, "-c", program, "fetch", "clip", "-o", str(tmp_path)]
    part = tmp_path / DRAFTS / "open_clip_pytorch_model.bin.part"
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "--from", f"{server.url}/clip.bin"], **options) as process:
        wait_for(lambda: part.exists() and part.stat().st_size == len(DATA) // 2)
        process.send_signal(number)
        errors = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == code and part.stat().st_size == len(DATA) // 2
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    assert errors == f"sd-perf: stopped by {name}\n"
