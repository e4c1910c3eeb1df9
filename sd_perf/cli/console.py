"""What commands print with: one console, silent on every rank but the first."""

from __future__ import annotations

import json
from typing import Any

from sd_perf.cli.place import RANK
from sd_perf.console import TextConsole
from sd_perf.visible import visible

CONSOLE = TextConsole(quiet=RANK > 0)


def print_plain(*lines: Any) -> None:
    """Print each on one line, neither wrapped nor coloured: scripts read paths from it."""
    CONSOLE.print(*map(visible, lines), sep="\n", soft_wrap=True)


def table_console() -> TextConsole:
    """The console for tables: 100 columns wide, not rich's 80, where the output is no terminal."""
    return CONSOLE if CONSOLE.is_terminal else TextConsole(width=100)


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    print(json.dumps(value, indent=2))
