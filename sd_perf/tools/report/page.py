"""RUN/report.html: one file that tells a run to a colleague. No scripts, nothing fetched."""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from html import escape
from pathlib import Path
from typing import Any

from sd_perf.config import Config
from sd_perf.files import disk_errors, write_text
from sd_perf.optional import optional
from sd_perf.runs.parity_record import closest_to_limit, rows_by_level, verdict
from sd_perf.tools.html import document, figure, quiet, table
from sd_perf.tools.report.charts import Panel, chart, median_window
from sd_perf.tools.report.pictures import newest_grid, progress_strip
from sd_perf.tools.report.record import RunRecord, as_dict, read_record

_LOG_SPAN = 30  # last over first position from which the loss reads better over a logarithmic axis
_SCORES = (
    ("fid", "FID", "lower is better", 1, ".2f"),
    ("clip", "CLIP score", "higher is better", 1, ".3f"),
    ("judge", "judge", "% of pictures right", 100, ".1f"),
)
"""key in scores.jsonl, name, what its axis says, scale, format"""


def write_report(run: Path) -> Path:
    """Write `report.html` of a run folder, from what the folder holds; returns its path.

    UserError for a folder that is no run, a file in it that cannot be understood, or a disk that
    refuses; ConfigError where matplotlib is missing.
    """
    optional("matplotlib", "a report needs matplotlib", "report")
    page, path = _page(read_record(run)), run / "report.html"
    with disk_errors(path, "make room there, then make the report again"):
        write_text(path, page)
    return path


def _page(record: RunRecord) -> str:
    name = escape(record.folder.resolve().name)
    sections = (
        ("Loss", _loss(record)),
        ("Scores", _scores(record)),
        ("Pictures", _pictures(record)),
        ("Speed", _speed(record)),
        ("Kernels", _kernels(record)),
        ("Parity", _parity(record)),
        ("MLPerf", _verdict(record)),
        ("Configuration", _config(record.manifest["config"])),
        ("Provenance", _provenance(record)),
    )
    body = "".join(f"<h2>{title}</h2>\n{content}\n" for title, content in sections)
    return document(
        f"{name} – sd-perf", f"<h1>{name}</h1>\n{_state(record)}\n{_numbers(record)}\n{body}"
    )


def _state(record: RunRecord) -> str:
    """Position, state, time and machine."""
    position, total, machine = (
        record.position,
        record.total,
        as_dict(record.manifest.get("machine")),
    )
    done = total is not None and position >= total
    start = (
        record.manifest["starts"][0].get("time")
        if record.manifest["starts"]
        else "at an unknown time"
    )
    gpus = machine.get("gpus") or []
    facts = [
        f"{position:,} of {total:,} samples" if total else f"{position:,} samples",
        "complete" if done else "not complete: stopped, or still running",
        "begun " + str(start).replace("T", " ").replace("+00:00", " UTC"),
        f"{_duration(record.metrics)} of training" if record.metrics else "",
        f"{len(gpus)} × {gpus[0]}"
        if gpus
        else f"{machine.get('cpus', 'unknown number of')} CPU cores, no GPU",
    ]
    checkpoints = record.checkpoints
    kept = (
        f"{len(checkpoints)} checkpoints, the newest at {checkpoints[-1]:,} samples"
        if checkpoints
        else "No checkpoint"
    )
    torn = (
        " The last line of metrics.jsonl is torn, as a killed run leaves it, and left out."
        if record.torn
        else ""
    )
    note = str(as_dict(record.manifest["config"].get("run")).get("note") or "").strip()
    return (
        f"<p>{escape(' · '.join(fact for fact in facts if fact))}</p><p "
        f'class="quiet">{kept}.{torn}</p>' + (f'<p class="note">{escape(note)}</p>' if note else "")
    )


def _numbers(record: RunRecord) -> str:
    """Headline numbers."""
    numbers = [("samples", f"{record.position:,}", "seen in training")]
    if record.metrics:
        losses = [line["loss"] for line in record.metrics]
        tenth = max(1, len(losses) // 10)
        first, last = statistics.fmean(losses[:tenth]), statistics.fmean(losses[-tenth:])
        steps = "logged step" if tenth == 1 else f"{tenth} logged steps"
        speed = statistics.median(line["samples_per_second"] for line in record.metrics)
        numbers += [("loss", f"{first:.4f} → {last:.4f}", f"means of the first and last {steps}")]
        numbers += [("samples/s", f"{speed:,.1f}", "median of logged steps")]
    for key, name, _, scale, form in _SCORES:
        line = next((line for line in reversed(record.scores) if _is_number(line, key)), None)
        if line:
            value = f"{scale * line[key]:{form}}" + (" %" if scale == 100 else "")
            numbers += [(name, value, f"n = {line['n']:,}, at {line['samples']:,}")]
    cards = (
        f'<div><dt>{a}</dt><dd><span class="value">{b}</span><span '
        f'class="detail">{c}</span></dd></div>'
        for a, b, c in numbers
    )
    return f'<dl class="numbers">{"".join(cards)}</dl>'


def _loss(record: RunRecord) -> str:
    if not record.metrics:
        return quiet("No step is logged yet (metrics.jsonl).")
    positions, losses = _column(record.metrics, "samples"), _column(record.metrics, "loss")
    log = positions[-1] >= _LOG_SPAN * positions[0] > 0
    panel = Panel("loss (mean squared error of v)", positions, losses, log=log)
    axis = ", logarithmic axis" if log else ""
    caption = (
        f"Points: logged steps. Line: running median of {median_window(len(losses))} of them{axis}."
    )
    return figure(
        chart([panel], f"Loss over samples: {losses[0]:.4f} at first, {losses[-1]:.4f} at last"),
        caption,
    )


def _scores(record: RunRecord) -> str:
    panels = []
    for key, name, axis, scale, _ in _SCORES:
        lines = [line for line in record.scores if _is_number(line, key)]
        if lines:
            values = [scale * value for value in _column(lines, key)]
            panels.append(Panel(f"{name} ({axis})", _column(lines, "samples"), values, "marks"))
    if not panels:
        return quiet("No checkpoint of this run has been evaluated (scores.jsonl).")
    counts = [
        (n, len(list(lines)))
        for n, lines in itertools.groupby(record.scores, lambda line: line["n"])
    ]
    caption = f"n = {counts[0][0]:,} pictures at each checkpoint."
    if len(counts) > 1:
        words = ", then ".join(
            f"{n:,} pictures at {lines} checkpoint{'s' * (lines > 1)}" for n, lines in counts
        )
        caption = (
            f"n differs: {words}. FID falls as n grows, for the same model: compare equal n alone."
        )
    return figure(
        chart(panels, "Scores over samples: " + ", ".join(panel.label for panel in panels)), caption
    )


def _pictures(record: RunRecord) -> str:
    if not record.pictures:
        return quiet("No pictures were drawn (samples/).")
    *earlier, newest = record.pictures
    strip = f"<h3>On the way</h3>{progress_strip(earlier)}" if earlier else ""
    return f"<p>At {newest.samples:,} samples:</p>{newest_grid(newest)}{strip}"


def _speed(record: RunRecord) -> str:
    if not record.metrics:
        return quiet("No step is logged yet (metrics.jsonl).")
    positions = _column(record.metrics, "samples")
    panels = [
        Panel(
            "throughput (samples/s)",
            positions,
            _column(record.metrics, "samples_per_second"),
            from_zero=True,
        ),
        Panel(
            "wait for data (% of time)",
            positions,
            [100 * line["data_wait"] for line in record.metrics],
            from_zero=True,
        ),
        Panel("learning rate", positions, _column(record.metrics, "lr"), "line", from_zero=True),
    ]
    caption = (
        f"Points: logged steps. Lines: running median of {median_window(len(positions))} of them; "
        "learning rate as is."
    )
    return figure(
        chart(panels, "Throughput, wait for data and learning rate over samples"), caption
    )


def _kernels(record: RunRecord) -> str:
    if not record.kernels:
        return quiet("No choice of kernels is recorded (kernels.json).")
    rows = []
    for choice in record.kernels:
        reasons = [
            f"{backend}: {why}" for backend, why in as_dict(choice.get("passed_over")).items()
        ]
        named = [] if choice.get("wanted") == "auto" else ["named in the config"]
        rows.append(
            [choice.get("op", ""), choice.get("backend", ""), "; ".join([*named, *reasons])]
        )
    return table(rows, ("op", "backend", "why no better one"))


def _parity(record: RunRecord) -> str:
    if not record.parity:
        implementation = as_dict(record.manifest["config"].get("model")).get(
            "implementation", "plain"
        )
        plain = "The plain network is what others are compared with."
        return quiet(
            plain
            if implementation == "plain"
            else "No parity record belongs to this run (parity.json)."
        )
    rows = (
        [level, len(some), sum(not row["ok"] for row in some), closest_to_limit(some)]
        for level, some in rows_by_level(record.parity)
    )
    head = "level", "comparisons", "red", "closest to its limit"
    facts = (
        f"Fast network against plain one on {record.parity.get('device')}, code "
        f"{record.parity.get('code')}."
    )
    words = f"<p><strong>{escape(verdict(record.parity))}</strong></p>"
    return words + quiet(escape(facts)) + table(rows, head)


def _verdict(record: RunRecord) -> str:
    if not record.verdict:
        return quiet("No MLPerf log of this run has been checked (mlperf_verdict.json).")
    verdict = {key: str(record.verdict.get(key) or "") for key in ("division", "ruleset", "words")}
    passed = "Passes" if record.verdict["passed"] else "Fails"
    division = f"{verdict['division']} division" if verdict["division"] else "no division declared"
    head = f"{passed} the official compliance checker ({division}, ruleset {verdict['ruleset']})."
    return f'<p><strong>{escape(head)}</strong></p><p class="note">{escape(verdict["words"])}</p>'


def _config(config: dict[str, Any]) -> str:
    defaults = json.loads(json.dumps(dataclasses.asdict(Config())))
    sections = []
    for section, keys in config.items():
        keys, known = keys if isinstance(keys, dict) else {"": keys}, defaults.get(section, {})
        rows = "".join(_config_row(key, value, known) for key, value in keys.items())
        sections.append(f"<section><h3>{escape(section)}</h3><table>{rows}</table></section>")
    how = quiet("Bold: not the default of this version, which is given below it.")
    return f'{how}<div class="config">{"".join(sections)}</div>'


def _config_row(key: str, value: Any, defaults: dict[str, Any]) -> str:
    shown = f"<td>{escape(key)}</td><td>{escape(_plain(value))}"
    if key in defaults and defaults[key] == value:
        return f"<tr>{shown}</td></tr>"
    default = f"default {_plain(defaults[key])}" if key in defaults else "unknown to this version"
    return f'<tr class="changed">{shown}<small>{escape(default)}</small></td></tr>'


def _provenance(record: RunRecord) -> str:
    manifest = record.manifest
    versions = [
        f"{package} {version}" for package, version in as_dict(manifest.get("versions")).items()
    ]
    facts = [
        ("git SHA", manifest.get("git_sha") or "not from a git checkout"),
        ("versions", ", ".join(versions)),
        ("platform", as_dict(manifest.get("machine")).get("platform", "")),
    ]
    starts = [
        (
            "resumed" if i else "started",
            start.get("time", ""),
            start.get("host", ""),
            start.get("command", ""),
        )
        for i, start in enumerate(manifest["starts"])
    ]
    return f"{table(facts)}{table(starts, ('', 'time', 'host', 'command'))}"


def _plain(value: Any) -> str:
    """A config value as a person reads it."""
    if value is None or value == "":
        return "none" if value is None else "(empty)"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _column(lines: list[dict[str, Any]], key: str) -> list[float]:
    return [line[key] for line in lines]


def _is_number(line: dict[str, Any], key: str) -> bool:
    return isinstance(line.get(key), int | float)


def _duration(metrics: list[dict[str, Any]]) -> str:
    """Time in logged steps; checkpoints and evaluations are not in it."""
    before = [0, *(line["samples"] for line in metrics)]
    seconds = sum(
        (line["samples"] - start) / max(line["samples_per_second"], 1e-9)
        for start, line in zip(before, metrics, strict=False)
    )
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return (
                f"{seconds / size:.0f} {unit}"
                if unit == "minutes"
                else f"{seconds / size:.1f} {unit}"
            )
    return f"{seconds:.0f} seconds"
