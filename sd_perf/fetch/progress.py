"""What is seen of a fetch: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

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


class Watch:
    """Tells of the files of a fetch; its methods may be called from any thread."""

    def __init__(self, console: TextConsole) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._all: TaskID | None = None
        self._have: dict[str, int] = {}
        self._first: dict[str, int] = {}
        self._total, self._files, self._done = 0, 0, 0
        self._start = self._told = time.monotonic()

    def say(self, text: object) -> None:
        """Print a line."""
        self._console.print(visible(text), soft_wrap=True)

    def begin(self, total: int, files: int) -> None:
        """Show that so many bytes (0: not known) in so many files are to come."""
        self._total, self._files = total, files
        self._start = self._told = time.monotonic()
        if self._console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            self._bars = Progress(*columns, console=self._console, transient=True)
            if files > 1:
                self._all = self._bars.add_task(self._title(), total=total or None)
            self._bars.start()

    def update(self, name: str, have: int, total: int | None) -> None:
        """Show how many bytes of a file are there."""
        with self._lock:
            self._first.setdefault(name, have)
            self._have[name] = have
            if self._bars is None:
                return
            if name not in self._tasks:
                self._tasks[name] = self._bars.add_task(visible(name), total=total, completed=have)
            self._bars.update(self._tasks[name], completed=have, total=total)
            self._update_all()

    def verifying(self, name: str) -> None:
        """Show that the bytes of a file are being compared with its digests."""
        with self._lock:
            if self._bars is not None and name in self._tasks:
                self._bars.update(self._tasks[name], description=f"{visible(name)}: comparing")

    def done(self, name: str, how: str) -> None:
        """Print that a file is there, and show it no longer."""
        with self._lock:
            self._done += 1
            size = decimal(self._have.get(name, 0))
            if self._bars is not None and name in self._tasks:
                self._bars.remove_task(self._tasks.pop(name))
                self._update_all()
            count = f"{self._done:,}/{self._files:,} " if self._files > 1 else ""
        self.say(f"{count}{name}: {size}, {how}")

    def tick(self) -> None:
        """Print a line about the progress, now and then, where there is no terminal."""
        now = time.monotonic()
        if self._bars is not None or now - self._told < EVERY:
            return
        self._told = now
        with self._lock:
            have, came = sum(self._have.values()), self._came()
        rate = came / (now - self._start)
        of, left = "", ""
        if self._total:
            of = f" of {decimal(self._total)}"
            if rate > 0:
                seconds = round(max(0, self._total - have) / rate)
                left = f", {datetime.timedelta(seconds=seconds)} left"
        self.say(f"{decimal(have)}{of}, {decimal(round(rate))}/s{left}")

    def close(self) -> None:
        """Take the bars off the screen."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _came(self) -> int:
        """Bytes that came since `begin`."""
        return sum(max(0, have - self._first[name]) for name, have in self._have.items())

    def _update_all(self) -> None:
        if self._bars is not None and self._all is not None:
            have = sum(self._have.values())
            self._bars.update(self._all, completed=have, description=self._title())

    def _title(self) -> str:
        return f"{self._done:,} of {self._files:,} files"
