"""Charts as SVG images. Each is drawn wide and narrow, so that a phone shows readable text."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Curve and points are one hue and differ in lightness alone: readable in any colour vision, and in
# print.
_CURVE, _POINTS, _TEXT, _GRID_LINES = "#0b5a94", "#9cc3e0", "#333333", "#dddddd"
# Hues that differ in any colour vision (Okabe and Ito 2008), darkened for thin lines on white.
_COLOURS = (
    "#0b5a94",
    "#c24e00",
    "#00785a",
    "#a34f85",
    "#b37400",
    "#2f8fc4",
    "#1c1c1c",
    "#7a7a00",
)
_FONTS = "-apple-system, 'Segoe UI', 'Helvetica Neue', Helvetica, Arial, 'DejaVu Sans', sans-serif"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "sd-perf",  # the same run draws the same bytes
    # Matplotlib measures text with this font. It is wider than those of _FONTS, which the page
    # shows, so nothing overlaps there.
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": _TEXT,
    "axes.labelcolor": _TEXT,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}
_BAND, _BAND_MEAN = "#e4e4e4", "#b8b8b8"
# More points than this are drawn as pixels: an SVG shape for each would make the file heavy.
_MANY = 2000


@dataclass(frozen=True)
class Band:
    """What others have reached at some positions: drawn in grey behind a panel's values."""

    samples: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """One quantity over the position of the run in samples."""

    label: str
    """of the y axis, with unit"""
    samples: Sequence[float]
    values: Sequence[float]
    style: Literal["cloud", "line", "marks"] = "cloud"
    """cloud: points and their running median; line: a line; marks: a line, a mark at each point,
    and the numbers of the first and the last"""
    logarithmic: bool = False
    """whether the axis of samples is"""
    from_zero: bool = False
    """whether the y axis begins at 0"""
    band: Band | None = None


@dataclass(frozen=True)
class Curve:
    """One run's values over its position in samples."""

    samples: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class Overlay:
    """One quantity of several runs, drawn over each other; `curve_style` tells which is which."""

    label: str
    """of the y axis, with unit"""
    curves: Sequence[Curve | None]
    """one per run; None where it has no values"""
    marks: bool = False
    """whether each point gets a mark; without, a curve is the running median of its points"""
    logarithmic: bool = False
    """whether the axis of samples is"""
    from_zero: bool = False
    """whether the y axis begins at 0"""


def curve_style(number: int) -> tuple[str, str]:
    """Colour and dashes ("solid", "dashed", "dotted") of the curve of a run of an overlay."""
    return _COLOURS[number % len(_COLOURS)], ("solid", "dashed", "dotted")[number % 3]


def median_window(count: int) -> int:
    """Points that a running median of `count` points spans: odd, a twentieth, at least 5."""
    return max(5, count // 20 | 1)


def running_median(values: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(indices, medians), both (K,), of the running median at K of the points, at most 600.

    The window shrinks towards the start, where a loss falls fast, down to 5 points.
    """
    array, count = np.asarray(values, float), len(values)
    # Evenly spaced indices draw a smooth curve over a linear axis, geometric ones over a
    # logarithmic one.
    even = np.linspace(0, count - 1, min(count, 400))
    geometric = np.geomspace(1, count, min(count, 200)) - 1
    indices = np.unique(np.concatenate([even, geometric]).round().astype(int))
    reach = np.clip(indices, 2, median_window(count) // 2)
    medians = [
        np.median(array[max(i - r, 0) : i + r + 1]) for i, r in zip(indices, reach, strict=True)
    ]
    return indices, np.array(medians)


def chart(panels: Sequence[Panel | Overlay], alt: str) -> str:
    """HTML of one image: the panels side by side, or one below the other on a narrow screen."""
    wide, narrow = _draw(panels, stacked=False), _draw(panels, stacked=True)
    source = f'<source media="(max-width: 620px)" srcset="{narrow}">'
    return f'<picture>{source}<img class="chart" src="{wide}" alt="{html.escape(alt)}"></picture>'


def _draw(panels: Sequence[Panel | Overlay], stacked: bool) -> str:
    """The figure as a data URI."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    count = len(panels)
    size = (3.8, 2.5 * count) if stacked else (10.4, 3.6 if count == 1 else 2.7)
    with rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(*((count, 1) if stacked else (1, count)), squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=True):
            if isinstance(panel, Overlay):
                _draw_overlay(axes, panel)
            else:
                _draw_panel(axes, panel)
        file = io.StringIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(file, format="svg", dpi=200, metadata=nothing)
    svg = file.getvalue().replace("'DejaVu Sans'", _FONTS)
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _draw_panel(axes: Axes, panel: Panel) -> None:
    samples, values = np.asarray(panel.samples, float), np.asarray(panel.values, float)
    if panel.band:
        at, low, high = (
            np.asarray(side, float)
            for side in (panel.band.samples, panel.band.low, panel.band.high)
        )
        axes.fill_between(at, low, high, color=_BAND, linewidth=0)
        axes.plot(at, (low + high) / 2, color=_BAND_MEAN, linewidth=1.0)
    if panel.style == "cloud":
        _draw_cloud(axes, samples, values)
    else:
        marker = "o" if panel.style == "marks" else ""
        axes.plot(samples, values, color=_CURVE, linewidth=1.6, marker=marker)
    if panel.style == "marks":
        _write_first_and_last(axes, samples, values)
    if panel.from_zero:
        axes.set_ylim(bottom=0, top=1.15 * max(float(np.nanmax(values)), 1e-9))
    _draw_axes(axes, panel)


def _draw_overlay(axes: Axes, overlay: Overlay) -> None:
    highest = 1e-9
    for number, curve in enumerate(overlay.curves):
        if curve is None:
            continue
        samples, values = np.asarray(curve.samples, float), np.asarray(curve.values, float)
        if not overlay.marks:
            indices, values = running_median(values)
            samples = samples[indices]
        colour, dashes = curve_style(number)
        marker = "o" if overlay.marks else ""
        axes.plot(samples, values, color=colour, linestyle=dashes, linewidth=1.6, marker=marker)
        highest = max(highest, float(values.max()))
    if overlay.from_zero:
        axes.set_ylim(bottom=0, top=1.15 * highest)
    _draw_axes(axes, overlay)


def _draw_cloud(axes: Axes, samples: np.ndarray, values: np.ndarray) -> None:
    """Every point, and the running median over them."""
    many = len(values) > _MANY
    size = 1.6 if many else 3.2
    axes.plot(samples, values, "o", color=_POINTS, markersize=size, mew=0, rasterized=many)
    indices, medians = running_median(values)
    axes.plot(samples[indices], medians, color=_CURVE, linewidth=1.6)


def _write_first_and_last(axes: Axes, samples: np.ndarray, values: np.ndarray) -> None:
    """The numbers of the first and the last point, on the side that the line does not take."""
    axes.margins(x=0.09, y=0.2)
    last = len(values) - 1
    for i, other in {0: last, last: 0}.items():
        points_up = 6 if values[i] >= values[other] else -14
        offset: dict[str, Any] = {
            "xytext": (0, points_up),
            "textcoords": "offset points",
            "ha": "center",
        }
        axes.annotate(f"{values[i]:.3g}", (samples[i], values[i]), color=_TEXT, **offset)


def _draw_axes(axes: Axes, panel: Panel | Overlay) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

    axes.yaxis.set_major_locator(MaxNLocator(5))
    if panel.logarithmic:
        axes.set_xscale("log")
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(axis="y", color=_GRID_LINES, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("samples seen")
    axes.set_ylabel(panel.label)
