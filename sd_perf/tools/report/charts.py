"""Charts as SVG images, each in a wide and a narrow drawing so that text stays readable on a
phone."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _PALE, _INK, _RULE = (
    "#0b5a94",
    "#9cc3e0",
    "#333333",
    "#dddddd",
)  # one hue, told apart by lightness alone
_FONTS = "-apple-system, 'Segoe UI', 'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "sd-perf",  # the same run draws the same bytes
    # What matplotlib measures with; it is wider than the fonts of _FONTS
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}
_MANY = 2000  # points beyond which an SVG shape for each would make the file heavy


@dataclass(frozen=True)
class Panel:
    """One quantity over the position in samples."""

    label: str
    """of the y axis, with unit"""
    samples: Sequence[float]
    values: Sequence[float]
    style: str = "cloud"
    """cloud: points and running median; line: a line; marks: a line with a mark and its number at
    each point"""
    log: bool = False
    """logarithmic in samples"""
    from_zero: bool = False


def median_window(count: int) -> int:
    """Points a running median of `count` points spans: odd, a twentieth of them, at least 5."""
    return max(5, count // 20 | 1)


def running_median(values: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(indices, medians), at some hundred indices. It shrinks towards the start, where a loss falls
    fast."""
    array, count = np.asarray(values, float), len(values)
    half = median_window(count) // 2
    even, towards_start = (
        np.linspace(0, count - 1, min(count, 400)),
        np.geomspace(1, count, min(count, 200)) - 1,
    )
    indices = np.unique(
        np.concatenate([even, towards_start]).round().astype(int)
    )  # dense on both kinds of axis
    reach = np.clip(indices, 2, half)
    medians = [
        np.median(array[max(i - r, 0) : i + r + 1]) for i, r in zip(indices, reach, strict=True)
    ]
    return indices, np.array(medians)


def chart(panels: list[Panel], alt: str) -> str:
    """HTML of one image: the panels side by side, or one below the other on a narrow screen."""
    wide, narrow = (_draw(panels, stacked) for stacked in (False, True))
    source = f'<source media="(max-width: 620px)" srcset="{narrow}">'
    return f'<picture>{source}<img class="chart" src="{wide}" alt="{html.escape(alt)}"></picture>'


def _draw(panels: list[Panel], stacked: bool) -> str:
    """The figure as a data URI."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    count = len(panels)
    size = (3.8, 2.5 * count) if stacked else (10.4, 3.6 if count == 1 else 2.7)
    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(*((count, 1) if stacked else (1, count)), squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=True):
            _draw_panel(axes, panel)
        file = io.StringIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(file, format="svg", dpi=200, metadata=nothing)
    svg = file.getvalue().replace("'DejaVu Sans'", _FONTS)
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _draw_panel(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

    samples, values = np.asarray(panel.samples, float), np.asarray(panel.values, float)
    if panel.style == "cloud":
        many = len(values) > _MANY
        axes.plot(
            samples,
            values,
            "o",
            color=_PALE,
            markersize=1.6 if many else 3.2,
            mew=0,
            rasterized=many,
        )
        indices, medians = running_median(values)
        axes.plot(samples[indices], medians, color=_BLUE, linewidth=1.6)
    else:
        axes.plot(
            samples,
            values,
            color=_BLUE,
            linewidth=1.6,
            marker="o" if panel.style == "marks" else "",
        )
    if panel.style == "marks":
        axes.margins(x=0.09, y=0.2)
        for i, other in {0: -1, len(values) - 1: 0}.items():
            y = 6 if values[i] >= values[other] else -14  # points, away from the line
            offset: dict[str, Any] = {
                "xytext": (0, y),
                "textcoords": "offset points",
                "ha": "center",
            }
            axes.annotate(f"{values[i]:.3g}", (samples[i], values[i]), color=_INK, **offset)
    if panel.from_zero:
        axes.set_ylim(bottom=0, top=1.15 * max(float(np.nanmax(values)), 1e-9))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if panel.log:
        axes.set_xscale("log")
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(axis="y", color=_RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("samples seen")
    axes.set_ylabel(panel.label)
