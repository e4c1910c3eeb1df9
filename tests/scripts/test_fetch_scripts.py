"""The benchmark's download scripts: from any folder, with the reference's options."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sd_perf.fetch.manifest import artefacts
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


FIRST, *OTHERS = FOLDERS
STUB = '#!/bin/sh\nprintf "%s\\n" "$@"\n'


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def run(script: Path, *options: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """The finished script, run in another folder."""
    command = [str(script), *map(str, options)]
    environment = {**os.environ, **variables}
    return subprocess.run(command, cwd="/", env=environment, capture_output=True, text=True)


@pytest.fixture
def checkout(tmp_path):
    """A checkout's scripts, whose sd-perf prints its arguments, a line each."""
    shutil.copytree(SCRIPTS, tmp_path / "scripts")
    write_program(tmp_path / ".venv/bin/sd-perf", STUB)
    return tmp_path


@pytest.fixture
def real(tmp_path):
    """real(name, options ...): a script of this checkout, run with this checkout's program."""
    words = f'#!/bin/sh\nexec "{sys.executable}" -m sd_perf "$@"\n'
    program = write_program(tmp_path / "bin/sd-perf", words)

    def call(name: str, *options: object) -> subprocess.CompletedProcess[str]:
        path = f"{program.parent}:{os.environ['PATH']}"
        return run(SCRIPTS / name, *options, PATH=path, PYTHONPATH=":".join(sys.path))

    return call


@pytest.mark.parametrize("name", FOLDERS)
def test_each_fetches_its_artefact_into_the_references_folder(name, checkout):
    artefact, default = FOLDERS[name]
    done = run(checkout / "scripts" / name, "--from", "a b", "-o", "c")
    words = ["fetch", artefact, "--output-dir", default, "--from", "a b", "-o", "c"]
    assert (done.returncode, done.stdout.splitlines()) == (0, words)
    assert artefact in artefacts()
    variable = "DOWNLOAD_PATH" if "coco-2014" in name else "OUTPUT_DIR"
    done = run(checkout / "scripts" / name, **{variable: "d e"})
    assert done.stdout.splitlines() == ["fetch", artefact, "--output-dir", "d e"]


def test_the_program_is_that_of_the_checkout_or_on_the_path(checkout):
    script = checkout / "scripts" / FIRST
    other = write_program(checkout / "bin/sd-perf", STUB.replace("%s", "other %s"))
    path = f"{other.parent}:/usr/bin:/bin"
    assert run(script, PATH=path).stdout.startswith("fetch")
    (checkout / ".venv/bin/sd-perf").unlink()
    assert run(script, PATH=path).stdout.startswith("other fetch")
    done = run(script, PATH="/usr/bin:/bin")
    assert done.returncode == 2 and "make install" in done.stderr


@pytest.mark.parametrize(
    "name", [FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_help(name, real):
    done = real(name, "-h")
    assert done.returncode == 0 and "--output-dir" in done.stdout and "--from" in done.stdout


def test_a_script_fetches(real, tmp_path):
    with hostile_server() as server:
        url = serve_prompts(server, "cut")
        name = "datasets/coco2014-validation-download-prompts.sh"
        done = real(name, "-o", tmp_path / "out", "--from", url)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/val2014_30k.tsv").read_bytes() == PROMPTS
