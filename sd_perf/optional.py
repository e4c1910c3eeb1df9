"""Packages that some commands need and others do without."""

from __future__ import annotations

import importlib
from typing import Any

from sd_perf.errors import ConfigError
from sd_perf.files import one_line


def optional(module: str, need: str, extra: str) -> Any:
    """The module; where it is missing, a ConfigError that says the need ("images need Pillow") and
    what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{need} ({one_line(error)}); pip install 'sd-perf[{extra}]'") from error
