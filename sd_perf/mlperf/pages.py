"""Verdicts and scores of a submission as tables and sentences for the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from sd_perf.mlperf.convergence_points import RCPVerdict
from sd_perf.mlperf.results import RUNS, Result
from sd_perf.mlperf.score import FLOPS_PER_SAMPLE, Score


def rcp_page(verdict: RCPVerdict) -> Iterator[Table | str]:
    """The RCP test: samples to converge of each run, the reference, the verdict."""
    unit = verdict.unit
    runs = Table("run", f"{unit} to converge", title="RCP test", title_justify="left")
    runs.columns[1].justify = "right"
    for result in verdict.results:
        runs.add_row(result.name, _converged(result))
    yield runs
    yield _facts(
        {
            "ruleset": verdict.ruleset,
            "global batch": f"{verdict.results[0].batch:,}",
            "olympic mean": "-" if verdict.mean is None else f"{verdict.mean:,.0f} {unit}",
            **_reference_facts(verdict),
        }
    )
    yield f"RCP test {verdict.words}"
    if len(verdict.results) != RUNS:
        yield f"note: these are {len(verdict.results)} runs; a submission has {RUNS}"


def score_page(
    score: Score, ruleset: str, gpus: int | None, peak: float | None
) -> Iterator[Table | str]:
    """Minutes of each run, the score, rates; then what stands against submitting.

    `peak` is the dense bfloat16 FLOP/s of each of the `gpus`.
    """
    unit = score.rcp.unit if score.rcp else "samples"
    runs = Table("run", "minutes", f"{unit} to converge", "seed", "")
    for column in runs.columns[1:3]:
        column.justify = "right"
    for i, (result, minutes) in enumerate(zip(score.results, score.minutes, strict=True)):
        shown = "does not count" if minutes is None else f"{minutes:.4f}"
        seeds = f"{len(result.seeds)} seeds" if len(result.seeds) > 1 else str(*result.seeds)
        remark = {score.dropped[0]: "dropped: fastest", score.dropped[1]: "dropped: slowest"}
        runs.add_row(result.name, shown, _converged(result), seeds, remark.get(i, ""))
    yield runs
    facts = {"ruleset": ruleset, "global batch": f"{score.results[0].batch:,}"}
    if score.mean is not None and score.scaled is not None:
        facts["olympic mean"] = f"{score.mean:.6f} minutes"
        if score.rcp:
            facts["RCP test"] = f"{score.rcp.words.split(':')[0]}, factor {score.rcp.factor:.6f}"
        facts["score"] = f"{score.scaled:.6f} minutes"
    yield _facts(facts | _rates(score, gpus, peak))
    faults = score.faults()
    yield from (f"against submitting: {fault}" for fault in faults)
    if not faults:
        yield "all seeds are distinct; nothing stands against submitting these runs"


def _rates(score: Score, gpus: int | None, peak: float | None) -> dict[str, str]:
    """Samples per second over all time of the runs, checkpoints included; per GPU; MFU."""
    if score.rate is None:
        return {}
    facts = {"samples/s": f"{score.rate:,.1f}"}
    if gpus is None:
        return facts | {"per GPU": "name their number with --gpus, and their kind with --gpu"}
    facts["per GPU"] = f"{score.rate / gpus:,.1f} samples/s of each of {gpus}"
    if peak is not None:
        share = score.rate / gpus * FLOPS_PER_SAMPLE / peak
        facts["MFU"] = f"{100 * share:.1f} % of {peak / 1e12:,.0f} TFLOP/s, dense bfloat16"
    return facts


def _reference_facts(verdict: RCPVerdict) -> dict[str, str]:
    reference = verdict.reference
    if reference is None:
        return {"reference": "none for this batch size"}
    return {
        "reference mean": f"{reference.mean:,.0f} {verdict.unit}: {reference.origin}",
        "least mean allowed": f"{reference.least:,.0f} {verdict.unit}",
        "scaling factor": f"{verdict.factor:.6f}",
    }


def _converged(result: Result) -> str:
    return "did not converge" if result.samples is None else f"{result.samples:,}"


def _facts(facts: dict[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(name, value)
    return table
