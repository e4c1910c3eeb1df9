"""Options and fixtures of the whole suite."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest_plugins = ["tests.small_run"]

torch.set_num_threads(1)
if not torch.cuda.is_available():
    # Read when triton is first imported: kernels then run in its interpreter, on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# nohup and a shell's background jobs ignore these, which the commands under test would inherit.
for _number, _handler in (
    (signal.SIGHUP, lambda *_: None),
    (signal.SIGINT, signal.default_int_handler),
):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run: the GPU, or the CPU through Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--real-data", type=Path, help="folder of real photographs, autoencoder and logs"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what `make test` leaves out of a `sampled` test's cases: it takes every nth.

    Tests marked `longest` come first, so that no worker is left alone with one at the end.
    """
    items.sort(key=lambda item: item.get_closest_marker("longest") is None)
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("sampled"):
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for of_one in cases.values():
        count = of_one[0].get_closest_marker("sampled").args[0]
        quick = {number * len(of_one) // count for number in range(count)}
        for number, item in enumerate(of_one):
            if number not in quick:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def real_data(request: pytest.FixtureRequest) -> Path:
    """The folder given by --real-data; the test skips without it."""
    folder = request.config.getoption("--real-data")
    if folder is None:
        pytest.skip("needs real files: pytest --real-data DIR")
    if not folder.is_dir():
        raise pytest.UsageError(f"--real-data {folder}: no such folder")
    return folder.resolve()


@pytest.fixture
def te(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The adapter `sd_kernels.fp8_linear.te` over a stand-in of Transformer Engine."""
    from tests.kernels import fake_te

    for name, module in fake_te.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "sd_kernels.fp8_linear.te", raising=False)
    yield importlib.import_module("sd_kernels.fp8_linear.te")
    sys.modules.pop("sd_kernels.fp8_linear.te", None)


@pytest.fixture
def mount_tmpfs(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """mount_tmpfs("size=256k") -> folder: a small or read-only disk, for as long as the test
    runs."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    folder = tmp_path / "disk"

    def mount(options: str) -> Path:
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        mounted = subprocess.run(command, capture_output=True, text=True)
        if mounted.returncode != 0:
            pytest.skip(f"cannot mount a tmpfs: {mounted.stderr.strip()}")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def sd_perf(capfd) -> Callable[..., tuple[int, str, str]]:
    """sd_perf("train", ...) -> exit code, stdout, stderr, in this process."""
    from sd_perf.cli import main

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        return exit.value.code, *capfd.readouterr()

    return call


@pytest.fixture
def refused(sd_perf) -> Callable[..., str]:
    """The sentence with which a command is refused; that it is one, and the exit code, are
    checked."""

    def call(*arguments: object) -> str:
        code, _, errors = sd_perf(*arguments)
        assert code == 2, errors
        return only_sentence(errors)

    return call


def only_sentence(errors: str) -> str:
    [line] = errors.splitlines()
    assert line.startswith("sd-perf: ") and "Traceback" not in line
    return line
