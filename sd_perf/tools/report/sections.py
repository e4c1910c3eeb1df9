"""The sections of a report, a function each: from what the run folder holds to HTML."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

from sd_perf.mlperf.reference_curves import verdict as verdict_of
from sd_perf.runs.parity_record import closest_to_limit, rows_by_level, verdict
from sd_perf.runs.scores import rounded
from sd_perf.tools.html import figure, quiet, table
from sd_perf.tools.report.charts import Panel, chart, median_window
from sd_perf.tools.report.config_table import config_table
from sd_perf.tools.report.convergence import progress_of, with_bands
from sd_perf.tools.report.pictures import newest_grid, progress_strip, through_training
from sd_perf.tools.report.run_contents import RunContents, as_dict
from sd_perf.tools.scores import OF_WEIGHTS, Score, shown_together

# The loss falls fastest at first. Once the last position is this many times the first one, a
# linear axis squeezes that fall into its left edge.
_LOGARITHMIC_FROM = 30


def is_logarithmic(metrics: list[dict[str, Any]]) -> bool:
    """Whether a run is so long that its axis of samples should be logarithmic."""
    return metrics[-1]["samples"] >= _LOGARITHMIC_FROM * metrics[0]["samples"] > 0


def _loss(run: RunContents) -> str:
    if not run.metrics:
        return quiet("No step is logged yet (metrics.jsonl).")
    positions, losses = _column(run.metrics, "samples"), _column(run.metrics, "loss")
    logarithmic = is_logarithmic(run.metrics)
    panel = Panel("loss (mean squared error of v)", positions, losses, logarithmic=logarithmic)
    panels = with_bands([panel], progress_of(run))
    axis = ", logarithmic axis" if logarithmic else ""
    window = median_window(len(losses))
    caption = f"Points: logged steps. Line: running median of {window} of them{axis}."
    alt = f"Loss over samples: {losses[0]:.4f} at first, {losses[-1]:.4f} at last"
    return figure(chart(panels, alt), caption)


def _scores(run: RunContents) -> str:
    shown = [_scores_figure(run, *each) for each in shown_together(run.scores)]
    nothing = quiet("No checkpoint of this run has been evaluated (scores.jsonl).")
    return "".join(shown) or nothing


def _scores_figure(run: RunContents, scores: Sequence[Score], lines: list[dict[str, Any]]) -> str:
    panels = []
    for score in scores:
        if own := score.lines(lines):
            values = [score.value(line) for line in own]
            label = f"{score.name} ({score.reading})"
            panels.append(Panel(label, _column(own, "samples"), values, style="marks"))
    alt = "Scores over samples: " + ", ".join(panel.label for panel in panels)
    caption, progress = _pictures_per_score(lines), progress_of(run)
    if any("judge" in line for line in lines):
        caption += " The judge is a program that reads whether a picture shows its caption."
    if scores is OF_WEIGHTS:
        panels = with_bands(panels, progress)
        if progress.curve:
            caption += f" Grey: published runs of this batch size. {escape(verdict_of(progress))}"
    return figure(chart(panels, alt), caption)


def _pictures_per_score(scores: list[dict[str, Any]]) -> str:
    """How many pictures the scores are of, with a warning where that differs."""
    counts = [
        (n, len(list(lines))) for n, lines in itertools.groupby(scores, lambda line: line["n"])
    ]
    if len(counts) == 1:
        drawn = ", drawn in bf16" * rounded(scores)
        return f"n = {counts[0][0]:,} pictures at each checkpoint{drawn}."
    words = ", then ".join(
        f"{n:,} pictures at {lines} checkpoint{'s' if lines > 1 else ''}" for n, lines in counts
    )
    return f"n differs: {words}. FID falls as n grows, for the same model: compare equal n alone."


def _pictures(run: RunContents) -> str:
    if not run.grids:
        return quiet("No pictures were drawn (samples/).")
    *earlier, newest = run.grids
    # Grids of other prompts than the newest, or of unknown ones, are shown as they are.
    strip = through_training(run.grids) or progress_strip(earlier)
    strip = f"<h3>On the way</h3>{strip}" if earlier else ""
    return f"<p>At {newest.samples:,} samples:</p>{newest_grid(newest)}{strip}"


def _speed(run: RunContents) -> str:
    if not run.metrics:
        return quiet("No step is logged yet (metrics.jsonl).")
    positions = _column(run.metrics, "samples")
    speed, rate = _column(run.metrics, "samples_per_second"), _column(run.metrics, "lr")
    wait = [100 * line["data_wait"] for line in run.metrics]
    panels = [
        Panel("throughput (samples/s)", positions, speed, from_zero=True),
        Panel("wait for data (% of time)", positions, wait, from_zero=True),
        Panel("learning rate", positions, rate, style="line", from_zero=True),
    ]
    caption = (
        f"Points: logged steps. Lines: running median of {median_window(len(positions))} of them; "
        "learning rate as is."
    )
    alt = "Throughput, wait for data and learning rate over samples"
    return figure(chart(panels, alt), caption)


def _kernels(run: RunContents) -> str:
    if not run.kernels:
        return quiet("No choice of kernels is recorded (kernels.json).")
    rows = []
    for choice in run.kernels:
        passed_over = as_dict(choice.get("passed_over"))
        reasons = [f"{backend}: {reason}" for backend, reason in passed_over.items()]
        if choice.get("wanted") != "auto":
            reasons.insert(0, "named in the config")
        rows.append([choice.get("op", ""), choice.get("backend", ""), "; ".join(reasons)])
    return table(rows, ("op", "backend", "why no better one"))


def _parity(run: RunContents) -> str:
    if not run.parity:
        model = as_dict(run.manifest["config"].get("model"))
        if model.get("implementation", "plain") == "plain":
            return quiet("The plain network is what others are compared with.")
        return quiet("No parity record belongs to this run (parity.json).")
    levels = (
        [level, len(rows), sum(not row["ok"] for row in rows), closest_to_limit(rows)]
        for level, rows in rows_by_level(run.parity)
    )
    device, code = run.parity.get("device"), run.parity.get("code")
    facts = f"Fast network against plain one on {device}, code {code}."
    words = f"<p><strong>{escape(verdict(run.parity))}</strong></p>"
    head = ("level", "comparisons", "red", "closest to its limit")
    return words + quiet(escape(facts)) + table(levels, head)


def _mlperf(run: RunContents) -> str:
    if not run.mlperf_verdict:
        return quiet("No MLPerf log of this run has been checked (mlperf_verdict.json).")
    division, ruleset, words = (
        str(run.mlperf_verdict.get(key) or "") for key in ("division", "ruleset", "words")
    )
    passed = "Passes" if run.mlperf_verdict["passed"] else "Fails"
    declared = f"{division} division" if division else "no division declared"
    head = f"{passed} the official compliance checker ({declared}, ruleset {ruleset})."
    return f'<p><strong>{escape(head)}</strong></p><p class="note">{escape(words)}</p>'


def _configuration(run: RunContents) -> str:
    return config_table(run.manifest["config"])


def _provenance(run: RunContents) -> str:
    manifest = run.manifest
    versions = as_dict(manifest.get("versions"))
    facts = [
        ("git SHA", manifest.get("git_sha") or "not from a git checkout"),
        ("versions", ", ".join(f"{package} {version}" for package, version in versions.items())),
        ("platform", as_dict(manifest.get("machine")).get("platform", "")),
    ]
    starts = [
        [
            "resumed" if i else "started",
            start.get("time", ""),
            start.get("host", ""),
            start.get("command", ""),
        ]
        for i, start in enumerate(manifest["starts"])
    ]
    return f"{table(facts)}{table(starts, ('', 'time', 'host', 'command'))}"


def _column(lines: list[dict[str, Any]], key: str) -> list[float]:
    return [line[key] for line in lines]


SECTIONS: dict[str, Callable[[RunContents], str]] = {
    "Loss": _loss,
    "Scores": _scores,
    "Pictures": _pictures,
    "Speed": _speed,
    "Kernels": _kernels,
    "Parity": _parity,
    "MLPerf": _mlperf,
    "Configuration": _configuration,
    "Provenance": _provenance,
}
"""title and content of each, in the order of the page"""
