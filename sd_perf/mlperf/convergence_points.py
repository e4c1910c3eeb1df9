"""The official RCP test: may runs have converged as fast as they did?

A reference convergence point (RCP) says after how many samples MLCommons' own runs passed at one
batch size. A submission whose mean is much smaller has changed more than speed, and fails; one that
is a little smaller passes, and its minutes are multiplied by the ratio of the means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sd_perf.errors import DataError
from sd_perf.mlperf.log import BENCHMARK, import_mlperf
from sd_perf.mlperf.official import OfficialToolError, call
from sd_perf.mlperf.results import RUNS, Result, as_submitted, counted

_PASS = "pruned_rcps"
"""the package checker's choice: points that are slower than their neighbours allow are left out"""


@dataclass(frozen=True)
class Reference:
    """What submissions of a batch size are compared with, in samples (steps in ruleset 3.1.0)."""

    mean: float
    least: float
    """smallest mean that is allowed"""
    origin: str
    """which point this is, in words"""


@dataclass(frozen=True)
class RCPVerdict:
    """The verdict of mlperf-logging's RCP checker on the runs of a submission."""

    results: tuple[Result, ...]
    ruleset: str
    passed: bool
    mean: float | None
    """olympic, of the samples to converge; None where too few runs converged"""
    reference: Reference | None
    factor: float
    """that the minutes are multiplied by"""
    words: str

    @property
    def unit(self) -> str:
        """What positions are counted in."""
        return "steps" if self.ruleset == "3.1.0" else "samples"


def check_rcp(results: Sequence[Result], ruleset: str) -> RCPVerdict:
    """Run the RCP test on the results of one submission, at least three.

    Raises DataError for fewer, which have no olympic mean.
    """
    if len(results) < 3:
        raise DataError(
            f"{counted(results)}: the best and the worst are dropped, so the RCP test needs three "
            f"runs at least, and a submission {RUNS}"
        )
    module = import_mlperf("rcp_checker.rcp_checker")
    batch = results[0].batch
    checker = call(module.RCP_Checker, "training", ruleset, BENCHMARK, False)
    reference = _reference(checker, batch)
    lost = sum(result.samples is None for result in results)
    try:
        with as_submitted([result.path for result in results]) as folder:
            # With set_scaling the checker writes into the temporary folder; without, it would
            # remove /scaling.json.
            passed, message, factor = call(
                module.check_directory,
                str(folder),
                "training",
                ruleset,
                False,
                False,
                rcp_pass=_PASS,
                set_scaling=True,
            )
    except OfficialToolError as error:
        raise DataError(
            f"{results[0].path.parent}: the RCP checker broke off with {error}; sd-perf mlperf "
            "check says what is wrong with a log"
        ) from error
    mean = _olympic_mean(results) if lost <= 1 else None
    return RCPVerdict(
        results=tuple(results),
        ruleset=ruleset,
        passed=bool(passed),
        mean=mean,
        reference=reference,
        factor=float(factor) if passed else 1.0,
        words=_words(results, bool(passed), message, mean, reference, float(factor)),
    )


def _olympic_mean(results: Sequence[Result]) -> float:
    """Mean of the samples to converge without the smallest and the largest."""
    samples = sorted(float("inf") if r.samples is None else r.samples for r in results)[1:-1]
    return sum(samples) / len(samples)


def _reference(checker: Any, batch: int) -> Reference | None:
    """The point that the checker compares this batch size with; None above the largest one."""
    points = {record["BS"]: record for record in checker.pruned_rcp_data.values()}
    smaller = max((size for size in points if size < batch), default=None)
    larger = min((size for size in points if size > batch), default=None)
    if batch in points:
        record, origin = points[batch], f"the reference convergence point of batch {batch:,}"
    elif larger is None:
        return None
    elif smaller is None:
        record, origin = points[larger], f"that of batch {larger:,}, the smallest one"
    else:
        _, record = call(checker._create_interp_rcp, batch, points[smaller], points[larger])
        origin = f"interpolated between those of batches {smaller:,} and {larger:,}"
    return Reference(float(record["RCP Mean"]), float(record["Min Epochs"]), origin)


def _words(
    results: Sequence[Result],
    passed: bool,
    message: str,
    mean: float | None,
    reference: Reference | None,
    factor: float,
) -> str:
    """The verdict in a sentence, with what to do where it is none to submit with."""
    lost = [result for result in results if result.samples is None]
    if mean is None:
        return (
            f"fails: {len(lost)} runs did not converge, and one may be dropped as the slowest; "
            "train further ones"
        )
    if reference is None:
        return (
            f"fails: there is no reference for batch {results[0].batch:,} or larger ({message}); "
            "submit a reference of your own, or take a smaller batch"
        )
    if not passed:
        return (
            f"fails: {mean:,.0f} is below the smallest mean allowed, {reference.least:,.0f}: runs "
            "that converge so fast differ from the reference in more than speed"
        )
    if factor > 1:
        return (
            f"passes: {mean:,.0f} is below the reference's mean, {reference.mean:,.0f}, and above "
            f"the least allowed, {reference.least:,.0f}: minutes are multiplied by {factor:.6f}"
        )
    return f"passes: {mean:,.0f} is not below the reference's mean, {reference.mean:,.0f}"
