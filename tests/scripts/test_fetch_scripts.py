"""The benchmark's download scripts: from any folder, with the reference's options."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_fetch import PROMPTS, serve_prompts
from tests.fetch.hostile_server import hostile_server

SCRIPTS = Path(__file__).parents[2] / "scripts"
FOLDERS = {
    "datasets/laion400m-filtered-download-moments.sh": (
        "laion400m-moments",
        "/datasets/laion-400m/webdataset-moments-filtered",
    ),
    "datasets/laion400m-filtered-download-images.sh": (
        "laion400m-images",
        "/datasets/laion-400m/webdataset-filtered",
    ),
    "datasets/laion400m-download-metadata.sh": (
        "laion400m-metadata",
        "/datasets/laion-400m/metadata",
    ),
    "datasets/coco2014-validation-download-prompts.sh": ("coco2014-prompts", "/datasets/coco2014"),
    "datasets/coco2014-validation-download-stats.sh": ("coco2014-statistics", "/datasets/coco2014"),
    "datasets/coco-2014-validation-download.sh": ("coco2014-validation", "/datasets/coco2014"),
    "checkpoints/download_sd.sh": ("stable-diffusion", "/checkpoints/sd"),
    "checkpoints/download_inception.sh": ("inception", "/checkpoints/inception"),
    "checkpoints/download_clip.sh": ("clip", "/checkpoints/clip"),
}
"""of each script: what it fetches, and the reference's folder"""


@pytest.fixture
def script(tmp_path):
    """script(name, options ...) -> the finished process, run in another folder."""
    program = tmp_path / "bin/sd-perf"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m sd_perf "$@"\n')
    program.chmod(0o755)

    def call(name: str, *options: object, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "PATH": f"{program.parent}:{os.environ['PATH']}",
            "PYTHONPATH": ":".join(sys.path),
            **variables,
        }
        command = [str(SCRIPTS / name), *map(str, options)]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True
        )

    return call


def folder(done: subprocess.CompletedProcess[str]) -> str:
    """The folder that a dry run names."""
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].removeprefix("folder: ").partition(",")[0]


@pytest.mark.parametrize("name", FOLDERS)
def test_each_fetches_its_artefact_into_the_references_folder(name, script):
    done = script(name, "--dry-run")
    artefact, default = FOLDERS[name]
    assert done.stdout.startswith(f"{artefact}: ") and folder(done) == default


FIRST, *OTHERS = FOLDERS


@pytest.mark.parametrize(
    "name", [FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_help(name, script):
    done = script(name, "-h")
    assert done.returncode == 0 and "--output-dir" in done.stdout and "--from" in done.stdout


def test_every_style_of_option(script):
    coco = "datasets/coco-2014-validation-download.sh"
    for options in (
        ["-o", "a b"],
        ["--output-dir=a b"],
        ["--download-path", "a b"],
    ):
        assert folder(script(coco, "--dry-run", *options)) == "a b"
    assert folder(script("checkpoints/download_sd.sh", "--dry-run", OUTPUT_DIR="c")) == "c"
    assert folder(script(coco, "--dry-run", DOWNLOAD_PATH="c")) == "c"


def test_bad_options(script):
    done = script("checkpoints/download_sd.sh", "--output-dri", "x")
    assert done.returncode == 2 and "--output-dri" in done.stderr


def test_a_script_fetches(script, tmp_path):
    with hostile_server() as server:
        url = serve_prompts(server, "cut")
        name = "datasets/coco2014-validation-download-prompts.sh"
        done = script(name, "-o", tmp_path / "out", "--from", url)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/val2014_30k.tsv").read_bytes() == PROMPTS
