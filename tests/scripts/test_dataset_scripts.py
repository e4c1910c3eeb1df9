"""The benchmark's scripts on data sets: their names, options and defaults, and what they call."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = {
    "laion400m-filter-metadata.sh": ("--input-metadata-dir -i", "--output-metadata-dir -o"),
    "laion400m-download-dataset.sh": ("--metadata-dir -m", "--output-dir -o"),
    "laion400m-download-dataset": ("--metadata-dir -m", "--output-dir -o"),
    "laion400m-convert-images-to-moments.sh": (
        "--input-folder -i",
        "--output-dir -o",
        "--output-dir --output-folder",
        "--checkpoint",
        "--config",
        "--num-gpus -g",
    ),
    "coco-2014-validation-split-resize.sh": (
        "--input-images-path -i",
        "--input-coco-captions -c",
        "--output-images-path -o",
        "--output-tsv-file -t",
        "--num-samples -n",
    ),
    "generate-fid-statistics.sh": ("--dataset-dir -d", "--output-file -o"),
}
"""script: its options, each with other names for it"""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """arguments(script, ...) -> what the script gives to sd-perf, which a stand-in prints."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "scripts", folder / "scripts", symlinks=True)
    (folder / "configs").symlink_to(ROOT / "configs")
    program = folder / ".venv" / "bin" / "sd-perf"
    program.parent.mkdir(parents=True)
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)

    def call(script: str, *words: str) -> list[str]:
        command = [folder / "scripts" / "datasets" / script, *words]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        return ran.stdout.splitlines()

    return call


@pytest.mark.parametrize("script", SCRIPTS)
def test_options_and_help(script, arguments, sd_perf):
    words = arguments(script, "-h")
    code, text, _ = sd_perf(*words)
    assert code == 0 and text.startswith(f"usage: sd-perf data {words[1]}")
    for names in SCRIPTS[script]:
        name, *others = names.split()
        assert name in text
        assert all(f" {other} " in text.replace(",", " ") for other in others), others


def test_what_the_user_says_comes_after_the_defaults(arguments):
    words = arguments("laion400m-filter-metadata.sh", "-i", "a folder with  spaces", "-o", "b")
    assert words[:2] == ["data", "filter-metadata"]
    assert words[2:6] == [
        "--input-metadata-dir",
        "/datasets/laion-400m/metadata",
        "--output-metadata-dir",
        "/datasets/laion-400m/metadata-filtered",
    ]
    assert words[6:10] == ["-i", "a folder with  spaces", "-o", "b"]


def test_the_last_of_two_values_is_taken(arguments, refused, tmp_path):
    """As the scripts need it: defaults first, then what the user says, by any of its names."""
    words = arguments("laion400m-filter-metadata.sh", "-i", str(tmp_path))
    assert f"{tmp_path}: holds no *.parquet files" in refused(*words)


def test_the_environment_gives_defaults(arguments, monkeypatch):
    """Under the names of the reference's scripts."""
    monkeypatch.setenv("DATASET_DIR", "some where")
    words = arguments("generate-fid-statistics.sh", "-o", "x")
    assert words[2:4] == ["--dataset-dir", "some where"]


def test_without_an_installation(tmp_path):
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    script = tmp_path / "scripts" / "datasets" / "generate-fid-statistics.sh"
    path = f"{tmp_path}:/usr/bin:/bin"
    if shutil.which("sd-perf", path=path):
        pytest.skip("sd-perf is among the system's programs")
    ran = subprocess.run([script], env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert ran.returncode == 2
    assert ran.stderr == "sd-perf is not installed; run `make install` in the checkout\n"
