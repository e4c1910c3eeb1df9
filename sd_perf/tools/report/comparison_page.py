"""The page of `sd-perf compare`: one HTML file, no scripts, nothing fetched."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from sd_perf.files import disk_errors, write_text
from sd_perf.optional import optional
from sd_perf.tools.html import document, figure, quiet, table
from sd_perf.tools.report.charts import Curve, Overlay, chart, curve_style
from sd_perf.tools.report.comparison import (
    Row,
    config_differences,
    ground_differences,
    names,
    results,
)
from sd_perf.tools.report.run_contents import RunContents
from sd_perf.tools.report.sections import is_logarithmic
from sd_perf.tools.scores import Score, shown_together


def write_page(runs: Sequence[RunContents], path: Path) -> None:
    """Write the comparison of runs to an HTML file.

    UserError for a disk that refuses; ConfigError where matplotlib is missing.
    """
    optional("matplotlib", "the page of a comparison needs matplotlib", "report")
    titles = names(runs)
    head = ("", *map(escape, titles))
    body = (
        f"<h1>{escape(', '.join(titles))}</h1>\n{_table(results(runs), head, 'Nothing yet.')}\n"
        f"<h2>Curves</h2>\n{_legend(titles)}\n{_curves(runs)}\n"
        f"<h2>Configs: keys that differ</h2>\n"
        f"{_table(config_differences(runs), head, 'The configs are the same.')}\n"
        f"<h2>Ground: what differs</h2>\n"
        f"{_table(ground_differences(runs), head, 'Machine, source, versions: the same.')}\n"
    )
    with disk_errors(path, "make room there, or choose another --output"):
        write_text(path, document(f"{escape(', '.join(titles))} – sd-perf", body))


def _table(rows: list[Row], head: tuple[str, ...], nothing: str) -> str:
    return f'<div class="wide">{table(rows, head)}</div>' if rows else quiet(nothing)


def _legend(titles: Sequence[str]) -> str:
    """The line of each run. Outside of the charts, where a name is text and nothing else."""
    items = []
    for number, title in enumerate(titles):
        colour, dashes = curve_style(number)
        items.append(f'<li><i style="border-top: 3px {dashes} {colour}"></i>{escape(title)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def _curves(runs: Sequence[RunContents]) -> str:
    trained = [run for run in runs if run.metrics]
    figures = []
    if trained:
        logarithmic = any(is_logarithmic(run.metrics) for run in trained)
        loss = Overlay("loss", _metric(runs, "loss"), logarithmic=logarithmic)
        speed = _metric(runs, "samples_per_second")
        rate = Overlay("throughput (samples/s)", speed, from_zero=True)
        axis = ", logarithmic axis" if logarithmic else ""
        figures.append(figure(chart([loss], "Loss over samples"), f"Running medians{axis}."))
        figures.append(figure(chart([rate], "Throughput over samples"), "Running medians."))
    for scores, lines in shown_together([line for run in runs for line in run.scores]):
        overlays = [_scores(runs, score) for score in scores if score.lines(lines)]
        alt = f"{', '.join(overlay.label for overlay in overlays)} over samples"
        figures.append(figure(chart(overlays, alt), _pictures_per_score(lines)))
    if not figures:
        return quiet("No run has logged a step or a score yet.")
    return f'<div class="curves">{"".join(figures)}</div>'


def _metric(runs: Sequence[RunContents], key: str) -> list[Curve | None]:
    return [
        Curve([line["samples"] for line in run.metrics], [line[key] for line in run.metrics])
        if run.metrics
        else None
        for run in runs
    ]


def _scores(runs: Sequence[RunContents], score: Score) -> Overlay:
    curves: list[Curve | None] = []
    for run in runs:
        lines = score.lines(run.scores)
        values = [score.value(line) for line in lines]
        curves.append(Curve([line["samples"] for line in lines], values) if lines else None)
    return Overlay(f"{score.name} ({score.reading})", curves, marks=True)


def _pictures_per_score(lines: Sequence[dict[str, Any]]) -> str:
    counts = sorted({line["n"] for line in lines})
    if len(counts) == 1:
        return f"n = {counts[0]:,} pictures at each point."
    words = ", ".join(f"{n:,}" for n in counts)
    return f"n differs ({words}). FID falls as n grows, for the same model: compare equal n alone."
