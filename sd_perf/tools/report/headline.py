"""The top of a report: the state of the run, and its numbers in large type."""

from __future__ import annotations

import statistics
from html import escape
from typing import Any

from sd_perf.tools.report.run_contents import RunContents, as_dict
from sd_perf.tools.scores import SCORES

_DAMAGED_SHOWN = 5


def state(run: RunContents) -> str:
    """Position, whether the run is complete, begin, time and machine; then its checkpoints."""
    facts = [_progress(run), _begin(run), _duration(run.metrics), _machine(run.manifest)]
    note = str(as_dict(run.manifest["config"].get("run")).get("note") or "").strip()
    return (
        f"<p>{escape(' · '.join(fact for fact in facts if fact))}</p>"
        f'<p class="quiet">{_files(run)}</p>'
        f"{_damaged(run.damaged)}" + (f'<p class="note">{escape(note)}</p>' if note else "")
    )


def _progress(run: RunContents) -> str:
    position, total = run.position, run.total
    seen = f"{position:,} of {total:,} samples" if total else f"{position:,} samples"
    complete = total is not None and position >= total
    return f"{seen} · {'complete' if complete else 'not complete: stopped, or still running'}"


def _begin(run: RunContents) -> str:
    starts = run.manifest["starts"]
    time = starts[0].get("time") if starts else "at an unknown time"
    return "begun " + str(time).replace("T", " ").replace("+00:00", " UTC")


def _machine(manifest: dict[str, Any]) -> str:
    machine = as_dict(manifest.get("machine"))
    gpus = machine.get("gpus") or []
    if gpus:
        return f"{len(gpus)} × {gpus[0]}"
    return f"{machine.get('cpus', 'unknown number of')} CPU cores, no GPU"


def _files(run: RunContents) -> str:
    """Which checkpoints are there, and whether metrics.jsonl is whole."""
    kept = "No checkpoint."
    if run.checkpoints:
        newest = f"{run.checkpoints[-1]:,} samples"
        kept = f"{len(run.checkpoints)} checkpoints, the newest at {newest}."
    if not run.torn:
        return kept
    return (
        f"{kept} The last line of metrics.jsonl is torn, as a killed run leaves it, and left out."
    )


def _damaged(lines: list[str]) -> str:
    """The lines that were left out as damaged: how many, and the first of them."""
    if not lines:
        return ""
    first = "; ".join(lines[:_DAMAGED_SHOWN])
    more = f"; and {len(lines) - _DAMAGED_SHOWN:,} more" if len(lines) > _DAMAGED_SHOWN else ""
    words = f"Damaged, and left out: {first}{more}."
    return f'<p class="note">{escape(words)}</p>'


def numbers(run: RunContents) -> str:
    """Samples, loss, speed and the newest scores: each a name, a value and what it is of."""
    cards = [("samples", f"{run.position:,}", "seen in training")]
    if run.metrics:
        losses = [line["loss"] for line in run.metrics]
        tenth = max(1, len(losses) // 10)
        first, last = statistics.fmean(losses[:tenth]), statistics.fmean(losses[-tenth:])
        steps = "logged step" if tenth == 1 else f"{tenth} logged steps"
        speed = statistics.median(line["samples_per_second"] for line in run.metrics)
        cards.append(("loss", f"{first:.4f} → {last:.4f}", f"means of the first and last {steps}"))
        cards.append(("samples/s", f"{speed:,.1f}", "median of logged steps"))
    for score in SCORES:
        if lines := score.lines(run.scores):
            newest = lines[-1]
            of = f"n = {newest['n']:,}, at {newest['samples']:,}"
            cards.append((score.name, score.text(newest), of))
    items = (
        f'<div><dt>{name}</dt><dd><span class="value">{value}</span><span '
        f'class="detail">{detail}</span></dd></div>'
        for name, value, detail in cards
    )
    return f'<dl class="numbers">{"".join(items)}</dl>'


def _duration(metrics: list[dict[str, Any]]) -> str:
    """Time in logged steps, without that of checkpoints and evaluations; empty without steps."""
    if not metrics:
        return ""
    starts = [0, *(line["samples"] for line in metrics)]
    seconds = sum(
        (line["samples"] - start) / max(line["samples_per_second"], 1e-9)
        for start, line in zip(starts, metrics, strict=False)
    )
    for unit, size, decimals in (("days", 86400, 1), ("hours", 3600, 1), ("minutes", 60, 0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.{decimals}f} {unit} of training"
    return f"{seconds:.0f} seconds of training"
