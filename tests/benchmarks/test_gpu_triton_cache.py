"""Triton's cache is made in one folder and found in another; in child processes, without the
interpreter that the tests have chosen."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks import gpu_triton_cache

ROOT = Path(__file__).parents[2]
LAUNCH = """
import json, sys
from pathlib import Path
from types import SimpleNamespace

import torch, triton
from triton.backends.compiler import GPUTarget

from benchmarks import ahead_of_time, gpu_triton_cache
from sd_kernels.registry import all_ops

archive, cache = map(Path, sys.argv[1:])
manifest = gpu_triton_cache.unpack(archive, cache)
triton.knobs.cache.dir = str(cache)
# As much of a GPU as Triton asks for before it looks into its cache.
gpu = {"get_current_device": lambda: 0, "get_current_stream": lambda device: 0}
gpu["get_current_target"] = lambda: GPUTarget("cuda", 90, 32)
triton.runtime.driver.set_active(SimpleNamespace(**gpu))
hits = []
triton.knobs.compilation.listener = lambda **event: hits.append(event["cache_hit"])
for _, launch in ahead_of_time.launches_of(all_ops()["v_mse_loss"], torch.bfloat16):
    launch.kernel.run(*launch.arguments, grid=(1,), warmup=True, **launch.options)
print(json.dumps([manifest["kernels"], hits, ahead_of_time.__file__]))
"""


def python(folder: Path, *arguments: str) -> str:
    """What Python prints with the packages of a folder, without Triton's interpreter."""
    paths = f"{folder}{os.pathsep}{folder / 'kernels'}"
    environment = {**os.environ, "PYTHONPATH": paths}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kernels of one op, compiled in this checkout and packed."""
    folder = tmp_path_factory.mktemp("pack")
    output = folder / "kernels.tar.xz"
    options = ["--ops", "v_mse_loss", "--cache", str(folder / "cache"), "--processes", "2"]
    printed = python(ROOT, "-m", "benchmarks.gpu_triton_cache", "--output", str(output), *options)
    assert " packed, " in printed
    shutil.rmtree(folder / "cache")  # what is found later is found elsewhere
    return output


@pytest.mark.slow
def test_the_key_holds_no_path(archive: Path, tmp_path: Path) -> None:
    """A copy of the sources elsewhere, with another cache folder, finds every kernel."""
    copy = tmp_path / "copy"
    for package in ("benchmarks", "kernels", "sd_perf"):
        shutil.copytree(
            ROOT / package, copy / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    script = tmp_path / "launch.py"
    script.write_text(LAUNCH)
    printed = python(copy, str(script), str(archive), str(tmp_path / "cache"))
    count, hits, imported = json.loads(printed.splitlines()[-1])
    assert imported.startswith(str(copy))
    assert len(hits) >= 2 and all(hits)
    assert count >= len(hits)


@pytest.mark.slow
def test_an_archive_holds_names_and_what_a_launch_needs(archive: Path) -> None:
    with tarfile.open(archive) as opened:
        names = opened.getnames()
        groups = [name for name in names if "__grp__" in name]
        texts = [opened.extractfile(name).read().decode() for name in groups]  # type: ignore[union-attr]
    assert names[0] == "manifest.json" and groups
    assert all(name.endswith((".cubin", ".json")) for name in names)
    assert not any("/" in text for text in texts)


def test_the_interpreter_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_triton_cache", "--output", str(tmp_path / "x")])
    monkeypatch.setattr(gpu_triton_cache, "interpreted", lambda: True)
    with pytest.raises(SystemExit) as leaving:
        gpu_triton_cache.main()
    assert leaving.value.code == 2 and "TRITON_INTERPRET is set" in capsys.readouterr().err
