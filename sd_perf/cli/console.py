"""What commands print with: one console, silent on every rank but the first."""

from __future__ import annotations

import json
import os
from typing import Any

from rich.console import Console

RANK = int(os.environ.get("RANK", "0"))
"""of this process among all that the launcher (torchrun, SLURM) started"""
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", "0"))
"""of this process among those on this machine"""
CONSOLE = Console(quiet=RANK > 0)


def print_plain(*lines: Any) -> None:
    """Print each on a line of its own, neither wrapped nor coloured: scripts read paths from it."""
    CONSOLE.print(*lines, sep="\n", highlight=False, soft_wrap=True)


def table_console() -> Console:
    """The console for tables: 100 columns wide, not rich's 80, where the output is no terminal."""
    return CONSOLE if CONSOLE.is_terminal else Console(width=100)


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    print(json.dumps(value, indent=2))
