"""A run's state for the terminal: a screen that is drawn again, or a line where there is none."""

from __future__ import annotations

import datetime
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sd_perf.console import styled
from sd_perf.tools.scores import SCORES
from sd_perf.tools.watch.status import Status

_BLOCKS, _ASCII = "▁▂▃▄▅▆▇█", "_.-=+*#@"
_SCORES_SHOWN = 4


def screen(status: Status, width: int, encoding: str = "utf-8") -> Group:
    """What is known of a run, in as many columns of text."""
    rows = Table.grid(padding=(0, 2))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column()
    rows.add_row("samples", _progress(status, width))
    for name, words in _facts(status, width, encoding):
        rows.add_row(name, words)
    head = Text.assemble(styled("bold", status.folder), styled("", f"  {status.state}"))
    return Group(head, rows)


def line(status: Status) -> str:
    """The same in one line, for a pipe or a log."""
    words = [f"{status.folder}: {_samples(status)}"]
    if status.metrics:
        words.append(f"loss {status.metrics[-1]['loss']:.4f}")
        words.append(f"{status.rate:,.1f} samples/s")
    if status.seconds_left:
        words.append(f"{duration(status.seconds_left)} left")
    return ", ".join([*words, status.state])


def sparkline(values: Sequence[float], width: int, levels: str = _BLOCKS) -> str:
    """The curve of values in at most `width` characters, each the median of its share of them.

    Heights are those of the logarithms, since a loss falls fastest at first.
    """
    count = min(width, len(values))
    edges = [len(values) * i // count for i in range(count + 1)] if count > 0 else []
    medians = [statistics.median(values[a:b]) for a, b in itertools.pairwise(edges)]
    heights = [math.log(max(value, 1e-30)) for value in medians]
    low = min(heights, default=0.0)
    span = max(heights, default=0.0) - low
    top = len(levels) - 1
    return "".join(levels[round(top * (h - low) / span) if span else 0] for h in heights)


def duration(seconds: float) -> str:
    """A time in its two largest units, such as "3 h 12 min"."""
    whole = round(seconds)
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // smaller} {name}"
    return f"{whole // 60} min" if whole >= 120 else f"{whole} s"


def _samples(status: Status) -> str:
    if status.total is None:
        return f"{status.samples:,} samples"
    return f"{status.samples:,} of {status.total:,}"


def _progress(status: Status, width: int) -> Table:
    row = Table.grid(padding=(0, 2))
    cells: list[Any] = [_samples(status)]
    if status.total:
        bar = ProgressBar(total=status.total, completed=status.samples, width=min(30, width // 4))
        cells += [bar, f"{min(100, 100 * status.samples // status.total)} %"]
    row.add_row(*cells)
    return row


def _facts(status: Status, width: int, encoding: str) -> list[tuple[str, str]]:
    facts = []
    if status.metrics:
        facts += _training(status, width, encoding)
    else:
        facts.append(("loss", "no step is logged yet"))
    if status.checkpoint is None or status.checkpoint_seconds is None:
        facts.append(("checkpoint", "none yet"))
    else:
        age = duration(status.checkpoint_seconds)
        facts.append(("checkpoint", f"at {status.checkpoint:,} samples, {age} ago"))
    for newest in status.scores[-_SCORES_SHOWN:]:
        facts.append(("score", _score(newest)))
    if status.damaged:
        words = f"{status.damaged:,} lines of metrics or scores; sd-perf report names them"
        facts.append(("damaged", words))
    return facts


def _score(scores: dict[str, Any]) -> str:
    numbers = [f"{score.name} {score.text(scores)}" for score in SCORES if score.lines([scores])]
    pictures = f"n {scores['n']:,}"
    return f"at {scores['samples']:,}: {', '.join([*numbers, pictures])}"


def _training(status: Status, width: int, encoding: str) -> list[tuple[str, str]]:
    """What the last logged steps say."""
    last, losses = status.metrics[-1], [line["loss"] for line in status.metrics]
    levels = _BLOCKS if encoding.lower().startswith("utf") else _ASCII
    curve = sparkline(losses, max(8, min(60, width - 40)), levels)
    speed = f"{status.rate:,.1f} samples/s, {100 * last['data_wait']:.0f} % of it waiting for data"
    facts = [
        ("loss", f"{curve} {last['loss']:.4f}, at first {losses[0]:.4f}"),
        ("speed", speed),
        ("lr", f"{last['lr']:.3g}"),
        ("last step", f"{duration(status.quiet_seconds or 0)} ago"),
    ]
    if status.seconds_left and status.holder:
        end = datetime.datetime.now() + datetime.timedelta(seconds=status.seconds_left)
        clock = f"{end:%H:%M}" if status.seconds_left < 86400 else f"{end:%d %b %H:%M}"
        facts.insert(2, ("left", f"{duration(status.seconds_left)}, done about {clock}"))
    return facts
