"""What commands print with: one console, silent on every rank but the first."""

from __future__ import annotations

import json
from typing import Any

from sd_perf.console import TextConsole
from sd_perf.distributed.launcher import Place, read_place
from sd_perf.errors import ConfigError
from sd_perf.visible import visible

try:
    PLACE = read_place()
except ConfigError:  # raised again by the commands that have ranks
    PLACE = Place()
RANK, LOCAL_RANK = PLACE.rank, PLACE.local_rank
"""of this process among all that the launcher started, and among those on this machine"""
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
