"""The score of a submission: minutes from run_start to the first checkpoint that passes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from sd_perf.errors import DataError
from sd_perf.mlperf.convergence_points import RCPVerdict, check_rcp
from sd_perf.mlperf.log import BENCHMARK, import_mlperf
from sd_perf.mlperf.official import OfficialToolError, call
from sd_perf.mlperf.results import RUNS, Result, as_submitted, counted

FLOPS_PER_SAMPLE = 2.4087e12
"""forward and backward of the benchmark's UNet, by its text alone: no optimization changes it"""


@dataclass(frozen=True)
class Score:
    """Minutes of the runs of a submission, as mlperf-logging's result summarizer computes them."""

    results: tuple[Result, ...]
    minutes: tuple[float | None, ...]
    """of each run; None where it does not count: not compliant, or not converged"""
    dropped: tuple[int, ...]
    """indices of the runs that do not enter the mean: the fastest and the slowest"""
    mean: float | None
    """olympic, minutes; None where too few runs count"""
    rcp: RCPVerdict | None
    """of the closed division"""

    @property
    def scaled(self) -> float | None:
        """The score: the mean times the factor of the RCP test."""
        return self.mean and self.mean * (self.rcp.factor if self.rcp else 1.0)

    @property
    def rate(self) -> float | None:
        """Samples per second over all time of the runs that count and converged."""
        pairs = [
            (result.samples, minutes)
            for result, minutes in zip(self.results, self.minutes, strict=True)
            if minutes and result.samples
        ]
        seconds = 60 * sum(minutes for _, minutes in pairs)
        # Logs of ruleset 3.1.0 count steps.
        unit = self.results[0].batch if self.rcp and self.rcp.unit == "steps" else 1
        return unit * sum(samples for samples, _ in pairs) / seconds if pairs else None

    def faults(self) -> list[str]:
        """What stands against submitting these runs, a sentence each."""
        found = []
        if len(self.results) != RUNS:
            found.append(f"these are {len(self.results)} runs; a submission has {RUNS}")
        if self.mean is None:
            found.append("more than one run does not count, so there is no score")
        found += [
            f"{result.name} did not converge, and the summarizer counts it all the same"
            for result, minutes in zip(self.results, self.minutes, strict=True)
            if minutes is not None and result.samples is None
        ]
        found += seed_faults(self.results)
        if self.rcp and not self.rcp.passed:
            found.append(f"the RCP test {self.rcp.words}")
        return found


def score_runs(results: Sequence[Result], ruleset: str) -> Score:
    """The score of runs of one submission, at least three. DataError for fewer."""
    if len(results) < 3:
        raise DataError(
            f"{counted(results)}: the fastest and the slowest are dropped, so a score needs three "
            f"at least, and a submission {RUNS}"
        )
    module = import_mlperf("result_summarizer.result_summarizer")
    try:
        with as_submitted([result.path for result in results]) as folder:
            # Not result_summarizer.compute_score, which fails in mlperf-logging 4.1.68.
            track, _, mean, _, _ = call(
                module._compute_strong_score_standalone,
                BENCHMARK,
                "",
                False,
                str(folder),
                "training",
                ruleset,
                return_full_scores=True,
            )
            names = [str(folder / f"result_{number}.txt") for number in range(len(results))]
    except OfficialToolError as error:
        raise DataError(
            f"{results[0].path.parent}: the result summarizer broke off with {error}; sd-perf "
            "mlperf check says what is wrong with a log"
        ) from error
    minutes = [track.get(name) for name in names]
    closed = results[0].division == "closed"
    return Score(
        results=tuple(results),
        minutes=tuple(minutes),
        dropped=_dropped(minutes),
        mean=mean,
        rcp=check_rcp(results, ruleset) if closed else None,
    )


def _dropped(minutes: Sequence[float | None]) -> tuple[int, ...]:
    """The fastest run and the slowest; one that does not count is the slowest."""
    order = sorted(range(len(minutes)), key=lambda i: (minutes[i] is None, minutes[i] or 0.0))
    return order[0], order[-1]


def seed_faults(results: Sequence[Result]) -> list[str]:
    """Runs without a seed, and seeds that two runs share, a sentence each."""
    found = [
        f"{result.name} has no seed; log it before init_stop"
        for result in results
        if not result.seeds
    ]
    owners: dict[object, list[str]] = defaultdict(list)
    for result in results:
        for seed in dict.fromkeys(map(str, result.seeds)):
            owners[seed].append(result.name)
    shared = {seed: names for seed, names in owners.items() if len(names) > 1}
    found += [
        f"seed {seed} is that of {' and '.join(names)}; every run draws its own"
        for seed, names in shared.items()
    ]
    return found
