"""Options and fixtures of the whole suite."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--real-data", type=Path, help="folder of real photographs, autoencoder and logs")


@pytest.fixture(scope="session")
def real_data(request: pytest.FixtureRequest) -> Path:
    """The folder given by --real-data; the test skips without it."""
    folder = request.config.getoption("--real-data")
    if folder is None:
        pytest.skip("needs real files: pytest --real-data DIR")
    if not folder.is_dir():
        raise pytest.UsageError(f"--real-data {folder}: no such folder")
    return folder.resolve()
