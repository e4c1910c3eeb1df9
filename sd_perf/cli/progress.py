"""How far a long command is: a bar on a terminal, plain lines elsewhere. Both go to stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sd_perf.console import TextConsole

_SECONDS_PER_LINE = 30
"""between two lines where there is no terminal"""

Report = Callable[[int, int], None]
"""called with what is done, and of how much"""


@contextmanager
def progress(what: str) -> Iterator[Report]:
    """A function to call with how much is done and of how much, for the block of a long command.

    `what` names the things that are counted, such as "pictures".
    """
    console = TextConsole(stderr=True)
    if not console.is_terminal:
        yield _PlainLines(what).report
        return
    columns = (
        TextColumn(what, markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)


class _PlainLines:
    """Lines such as "12,000 of 30,000 pictures", not more than one in _SECONDS_PER_LINE."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._next = time.monotonic() + _SECONDS_PER_LINE

    def report(self, done: int, of: int) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _SECONDS_PER_LINE
            TextConsole(stderr=True).print(f"{done:,} of {of:,} {self._what}")
