"""What is seen of a fetch: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import collections
import datetime
import threading
import time

from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from sd_perf.console import TextConsole
from sd_perf.visible import visible

EVERY = 30
"""seconds between lines about the progress where there is no terminal"""
_REDRAW = 0.08
"""seconds between two drawings of the bars"""


class Watch:
    """Tells of the files of a fetch.

    `say`, `update`, `verifying` and `done` may be called from any thread. What they say is printed
    by the main thread, in `tick`: bars and lines of several threads would spoil each other.
    """

    def __init__(self, console: TextConsole) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._lines: collections.deque[str] = collections.deque()
        self._bars: Progress | None = None
        self.begin(0, 0)

    def say(self, text: object) -> None:
        """Print a line."""
        self._lines.append(visible(text))
        if threading.current_thread() is threading.main_thread():
            self._print()

    def begin(self, total: int, files: int) -> None:
        """Show that so many bytes (0: not known) in so many files are to come; forget others."""
        self.close()
        self._tasks: dict[str, TaskID] = {}
        self._all: TaskID | None = None
        self._under_way: dict[str, tuple[str, int, int | None]] = {}
        """title, bytes that are there and bytes in all of every file that is being fetched"""
        self._have: dict[str, int] = {}
        self._first: dict[str, int] = {}
        self._total, self._files, self._done = total, files, 0
        self._start = self._told = self._drawn = time.monotonic()
        if files and self._console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            self._bars = Progress(
                *columns, console=self._console, transient=True, auto_refresh=False
            )
            if files > 1:
                self._all = self._bars.add_task(self._title(), total=total or None)
            self._bars.start()

    def update(self, name: str, have: int, total: int | None) -> None:
        """Show how many bytes of a file are there."""
        with self._lock:
            self._first.setdefault(name, have)
            self._have[name] = have
            self._under_way[name] = visible(name), have, total

    def verifying(self, name: str) -> None:
        """Show that the bytes of a file are being compared with its digests."""
        with self._lock:
            _, have, total = self._under_way.get(name, ("", 0, None))
            self._under_way[name] = f"{visible(name)}: comparing", have, total

    def done(self, name: str, size: int, how: str) -> None:
        """Tell that a file is there: by a line, or by a bar that goes and a count that grows."""
        with self._lock:
            self._done += 1
            self._have[name] = size
            self._first.setdefault(name, size)
            self._under_way.pop(name, None)
            count = f"{self._done:,}/{self._files:,} " if self._files > 1 else ""
        if self._bars is None or self._files == 1:
            self.say(f"{count}{name}: {decimal(size)}, {how}")

    def tick(self) -> None:
        """Show what is new; to be called by the main thread, as often as it likes."""
        self._print()
        now = time.monotonic()
        if self._bars is not None and now - self._drawn >= _REDRAW:
            self._drawn = now
            self._draw(self._bars)
        elif self._bars is None and now - self._told >= EVERY:
            self._tell_progress()

    def close(self) -> None:
        """Print what is left, and take the bars off the screen."""
        self._print()
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _draw(self, bars: Progress) -> None:
        """A bar for every file that is under way, and one for all."""
        with self._lock:
            under_way, have = dict(self._under_way), sum(self._have.values())
        for name in self._tasks.keys() - under_way.keys():
            bars.remove_task(self._tasks.pop(name))
        for name, (title, came, total) in under_way.items():
            if name not in self._tasks:
                self._tasks[name] = bars.add_task(title, total=total, completed=came)
            bars.update(self._tasks[name], completed=came, total=total, description=title)
        if self._all is not None:
            bars.update(self._all, completed=have, description=self._title())
        bars.refresh()

    def _print(self) -> None:
        while self._lines:
            self._console.print(self._lines.popleft(), soft_wrap=True)

    def _tell_progress(self) -> None:
        """Print a line about bytes, rate and time left."""
        self._told = time.monotonic()
        with self._lock:
            have = sum(self._have.values())
            came = sum(max(0, have - self._first[name]) for name, have in self._have.items())
        rate = came / (self._told - self._start)
        of, left = "", ""
        if self._total:
            of = f" of {decimal(self._total)}"
            if rate > 0:
                seconds = round(max(0, self._total - have) / rate)
                left = f", {datetime.timedelta(seconds=seconds)} left"
        self.say(f"{decimal(have)}{of}, {decimal(round(rate))}/s{left}")

    def _title(self) -> str:
        return f"{self._done:,} of {self._files:,} files"
