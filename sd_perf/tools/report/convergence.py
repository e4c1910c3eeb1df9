"""A run's FID, CLIP score and loss beside those of published runs of its batch size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from sd_perf.config import FIRST_WEIGHTS, SPEED_ONLY, UNetConfig
from sd_perf.errors import DataError
from sd_perf.files import disk_errors, misfit, write_text
from sd_perf.mlperf.log import logged_scores, scan_log
from sd_perf.mlperf.reference_curves import (
    CLIP_DEVIATION,
    FID_DEVIATION,
    LOSS_BATCH,
    LOSS_DEVIATION,
    LOSSES,
    Progress,
    expected_loss,
    verdict,
)
from sd_perf.mlperf.results import logs_of
from sd_perf.mlperf.rules import EVAL_SAMPLES
from sd_perf.mlperf.rulesets import ruleset_of
from sd_perf.optional import optional
from sd_perf.tools.html import document, quiet
from sd_perf.tools.report.charts import Band, Panel, chart
from sd_perf.tools.report.run_contents import RunContents, as_dict, read_run
from sd_perf.tools.scores import OF_WEIGHTS

PAGE = "convergence.html"


def read_progress(paths: Sequence[Path]) -> list[Progress]:
    """How far runs have come: of run folders, also of runs under way, and of MLPerf logs."""
    found = []
    for path in paths:
        if (path / "run_manifest.json").is_file():
            found.append(progress_of(read_run(path)))
        else:
            found += [_progress_of_log(log) for log in logs_of([path])]
    return found


def progress_of(run: RunContents) -> Progress:
    """The progress of a run folder."""
    config = run.manifest["config"]
    training, optimizer = as_dict(config.get("training")), as_dict(config.get("optimizer"))
    batch, rate = training.get("global_batch_size"), optimizer.get("base_learning_rate")
    fid, clip = OF_WEIGHTS[0], OF_WEIGHTS[1]
    scored = fid.lines(clip.lines(run.scores))
    return Progress(
        name=run.folder.resolve().name,
        batch=batch if isinstance(batch, int) else 0,
        base_learning_rate=rate if isinstance(rate, float | int) else 0.0,
        scores=[(line["samples"], line["fid"], line["clip"], line["n"]) for line in scored],
        losses=[(line["samples"], line["loss"]) for line in run.metrics],
        other_world=_other_world(config),
    )


def _other_world(config: dict[str, Any]) -> str:
    """Why the run of this config does not compute what published runs do; empty where it does."""
    model = as_dict(config.get("model"))
    for name, value in vars(UNetConfig()).items():
        theirs = model.get(name, value)
        theirs = tuple(theirs) if isinstance(theirs, list) else theirs
        if name in FIRST_WEIGHTS and theirs:
            return f"it began from other weights than random ones (model.{name} is {theirs})"
        if name not in SPEED_ONLY and theirs != value:
            return f"its network is not the benchmark's (model.{name} is {theirs}, not {value})"
    if as_dict(config.get("data")).get("format") == "synthetic":
        return "its data are synthetic"
    return ""


def _progress_of_log(log: Path) -> Progress:
    """The progress that an MLPerf log tells, which has no loss."""
    events, _ = scan_log(log)
    values = {event.key: event.value for event in events}
    batch: Any = values.get("global_batch_size")
    rate, n = values.get("opt_base_learning_rate", 0.0), values.get("eval_samples", 0)
    if misfit(batch, int) or batch <= 0 or misfit(rate, float) or misfit(n, int):
        raise DataError(
            f"{log}: tells no batch size, learning rate and eval_samples in numbers; sd-perf "
            "mlperf check has every finding"
        )
    in_steps = ruleset_of(events)[0] == "3.1.0"
    place, unit = ("step_num", batch) if in_steps else ("samples_count", 1)
    scores = [
        (at * unit, found["FID"], found["CLIP"], n)
        for at, found in logged_scores(events, place).items()
        if {"FID", "CLIP"} <= found.keys() and not misfit([*found.values()], [float])
    ]
    return Progress(f"{log.parent.name}/{log.name}", batch, rate / batch, scores)


def with_bands(panels: Sequence[Panel], progress: Progress) -> list[Panel]:
    """The panels of FID, CLIP score and loss with the bands of published runs, where there are
    any."""
    return [replace(panel, band=_band(panel, progress)) for panel in panels]


def _band(panel: Panel, progress: Progress) -> Band | None:
    curve = progress.curve
    if curve is None:
        return None
    if panel.label.startswith("loss") and progress.batch == LOSS_BATCH:
        reach = 2 * LOSS_DEVIATION
        last = int(max(panel.samples)) // LOSS_BATCH
        steps = [step for step, _ in LOSSES if step < last] + [last]
        known = [
            (step * LOSS_BATCH, loss, reach) for step in steps if (loss := expected_loss(step))
        ]
        return Band(*_sides(known)) if known else None
    if any(n != EVAL_SAMPLES for *_, n in progress.scores):
        return None
    if panel.label.startswith("FID"):
        return Band(*_sides([(at, fid, 2 * FID_DEVIATION * fid) for at, fid, _ in curve.points]))
    if panel.label.startswith("CLIP"):
        return Band(*_sides([(at, clip, 2 * CLIP_DEVIATION) for at, _, clip in curve.points]))
    return None


def _sides(
    points: Sequence[tuple[int, float, float]],
) -> tuple[list[int], list[float], list[float]]:
    """Positions, lower and upper limits of (position, mean, reach)."""
    return (
        [at for at, _, _ in points],
        [mean - reach for _, mean, reach in points],
        [mean + reach for _, mean, reach in points],
    )


def write_convergence(progresses: Sequence[Progress], path: Path) -> None:
    """Write one page with curves, bands and words of each run."""
    optional("matplotlib", "a chart needs matplotlib", "report")
    sections = "".join(
        f"<h2>{escape(progress.name)}</h2><p>{escape(verdict(progress))}</p>{_charts(progress)}"
        for progress in progresses
    )
    grey = (
        "Grey: published runs of the batch size, the mean and two standard deviations of one run "
        "to each side."
    )
    how = quiet(grey) if any(progress.curve for progress in progresses) else ""
    with disk_errors(path, "make room there, or name another --output"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, document("convergence – sd-perf", f"<h1>Convergence</h1>{how}{sections}"))


def _charts(progress: Progress) -> str:
    panels = []
    if progress.scores:
        at = [line[0] for line in progress.scores]
        for i, label in ((1, "FID (lower is better)"), (2, "CLIP score (higher is better)")):
            panels.append(Panel(label, at, [line[i] for line in progress.scores], style="marks"))
    if progress.losses:
        samples, losses = zip(*progress.losses, strict=True)
        panels.append(Panel("loss (mean squared error of v)", samples, losses))
    if not panels:
        return quiet("Neither a loss nor a score is known yet.")
    alt = f"{', '.join(panel.label for panel in panels)} over samples of {progress.name}"
    return chart(with_bands(panels, progress), alt)
