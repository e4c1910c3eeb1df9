"""Imports of packages that only some commands need."""

from __future__ import annotations

import importlib
from typing import Any

from sd_perf.errors import ConfigError
from sd_perf.files import one_line


def optional(module: str, need: str, extra: str) -> Any:
    """Import a module that only some commands need.

    Where it is missing, ConfigError says why it is needed (`need`, such as "images need Pillow")
    and how to install it: as the extra `extra` of sd-perf.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(f"{need} ({one_line(error)}); pip install 'sd-perf[{extra}]'") from error
