"""`sd-perf watch`: shows a run until it is complete."""

from __future__ import annotations

import time
from pathlib import Path

from rich.live import Live

from sd_perf.console import TextConsole
from sd_perf.tools.watch.screen import line, screen
from sd_perf.tools.watch.status import Watcher


def watch_run(folder: Path, console: TextConsole, seconds: float) -> None:
    """Show a run every so many seconds, until it is complete; UserError as `Watcher.look`.

    On a terminal the screen is drawn again in place. Elsewhere a line is printed where it is
    another than the one before.
    """
    watcher = Watcher(folder)
    if console.is_terminal:
        _redraw(watcher, console, seconds)
        return
    before = ""
    while not (status := watcher.look()).is_complete:
        if (now := line(status)) != before:
            console.print(now, soft_wrap=True)
            before = now
        time.sleep(seconds)
    console.print(line(status), soft_wrap=True)


def show_once(folder: Path, console: TextConsole) -> None:
    """Show a run as it is now."""
    console.print(screen(Watcher(folder).look(), console.width, console.encoding))


def _redraw(watcher: Watcher, console: TextConsole, seconds: float) -> None:
    with Live(console=console, auto_refresh=False) as live:
        while True:
            status = watcher.look()
            live.update(screen(status, console.width, console.encoding), refresh=True)
            if status.is_complete:
                return
            time.sleep(seconds)
