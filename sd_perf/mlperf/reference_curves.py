"""The way of published runs to the target, and whether a run is on it.

FID and CLIP score are those of MLCommons' reference runs (means of 13 or 14 runs, README of the
reference) and of submissions of rounds v4.1 and v5.0; the loss is that of a submission of v3.1 (ten
runs, batch 512). Bands are two standard deviations of one run to each side.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from sd_perf.mlperf.log import passes
from sd_perf.mlperf.rules import EVAL_SAMPLES

FID_DEVIATION, CLIP_DEVIATION, LOSS_DEVIATION = 0.076, 0.007, 0.05
"""standard deviation of one run: of FID as a share of it and of the CLIP score, from ten published
runs of round v5.0 between 1.0 and 2.0 million samples; of a single step's loss"""
SMALL_WINDOW = 10
"""logged steps whose median loss is compared"""


@dataclass(frozen=True)
class Curve:
    """Mean scores of published runs of one batch size and learning rate."""

    batch: int
    base_learning_rate: float
    """per sample of the batch"""
    source: str
    points: tuple[tuple[int, float, float], ...]
    """(samples, FID, CLIP score), ascending; the last one passes"""

    @property
    def passes_at(self) -> int:
        """The first position at which the means pass."""
        passing = (at for at, fid, clip in self.points if passes({"FID": fid, "CLIP": clip}))
        return next(passing)

    def expected(self, samples: int) -> tuple[float, float] | None:
        """(FID, CLIP score) at a position, between two points linearly; None outside of all."""
        if not self.points[0][0] <= samples <= self.points[-1][0]:
            return None
        right = bisect_left([point[0] for point in self.points], samples)
        after = self.points[right]
        before = self.points[max(right - 1, 0)]
        share = (samples - before[0]) / (after[0] - before[0]) if after != before else 0.0
        fid, clip = (before[i] + share * (after[i] - before[i]) for i in (1, 2))
        return fid, clip


_FID = {
    512: (243.5, 159.9, 113.7, 100.4, 83.7, 75.2, 65.6, 61.5, 61.0, 55.4),
    1024: (372.1, 219.5, 150.3, 115.7, 93.4, 83.6, 76.5, 65.9, 62.3, 59.4),
    2048: (387.1, 292.4, 242.2, 187.8, 145.4, 111.0, 95.6, 85.3, 73.0, 68.9),
}
_CLIP = {
    512: (0.0571, 0.1013, 0.1346, 0.1498, 0.1655, 0.1767, 0.1902, 0.1958, 0.1978, 0.2061),
    1024: (0.0382, 0.0761, 0.1132, 0.1355, 0.1597, 0.1710, 0.1758, 0.1899, 0.1947, 0.1973),
    2048: (0.0449, 0.0466, 0.0679, 0.0958, 0.1219, 0.1436, 0.1601, 0.1708, 0.1822, 0.1890),
}
"""batch: scores of the reference after each 512,000 samples"""


def _reference(batch: int) -> Curve:
    positions = range(512_000, 5_632_000, 512_000)
    points = tuple(zip(positions, _FID[batch], _CLIP[batch], strict=True))
    return Curve(batch, 1.25e-7, "MLCommons' reference", points)


CURVES = (
    *map(_reference, _FID),
    Curve(
        256,
        1.8e-7,
        "submissions of v4.1",
        ((1_024_000, 126.4, 0.1275), (1_536_000, 102.7, 0.1473), (2_048_000, 85.4, 0.1641)),
    ),
    Curve(
        256,
        2.8e-7,
        "submissions of v5.0",
        ((1_024_000, 115.5, 0.1325), (1_536_000, 90.5, 0.157), (2_048_000, 81.0, 0.170)),
    ),
    Curve(
        512,
        2.3e-7,
        "submissions of v5.0",
        ((1_024_000, 139.5, 0.120), (1_536_000, 106.2, 0.149), (2_048_000, 87.6, 0.170)),
    ),
)
LOSS_BATCH = 512
_LOSS_STEPS = (100, 200, 300, 400, 500, 600, 800, 1000, 1500, 2000, 3000, 4000, 5000)
_LOSS = (1.09, 0.709, 0.61, 0.505, 0.448, 0.444, 0.403, 0.359, 0.359, 0.346, 0.335, 0.314, 0.318)
LOSSES = tuple(zip(_LOSS_STEPS, _LOSS, strict=True))
"""(step, mean loss of that step) at batch 512, base learning rate 1.25e-7, 1000 steps of warm-up"""


@dataclass(frozen=True)
class Progress:
    """How far a run has come, whether it is over or under way."""

    name: str
    batch: int
    base_learning_rate: float
    scores: Sequence[tuple[int, float, float, int]]
    """(samples, FID, CLIP score, pictures), ascending"""
    losses: Sequence[tuple[int, float]] = field(default=())
    """(samples, loss) of logged steps, ascending"""
    other_world: str = ""
    """why published runs are no measure for this one; empty where they are"""

    @property
    def curve(self) -> Curve | None:
        """The published runs of this batch size with the nearest learning rate."""
        rate = math.log(self.base_learning_rate) if self.base_learning_rate > 0 else math.inf
        same = [curve for curve in CURVES if curve.batch == self.batch and not self.other_world]
        return min(
            same, key=lambda curve: abs(math.log(curve.base_learning_rate) - rate), default=None
        )


def verdict(progress: Progress) -> str:
    """Whether a run is on the way of published runs, in a few sentences."""
    if progress.other_world:
        return f"No published run is a measure for this one: {progress.other_world}."
    curve = progress.curve
    if curve is None:
        sizes = ", ".join(f"{size:,}" for size in sorted({curve.batch for curve in CURVES}))
        return (
            f"No runs of batch {progress.batch:,} are published as a measure; there are those of "
            f"{sizes}."
        )
    words = [_scores_in_words(progress, curve), _loss_in_words(progress)]
    return " ".join(filter(None, words))


def _scores_in_words(progress: Progress, curve: Curve) -> str:
    rate = f"{curve.base_learning_rate:g} per sample"
    who = f"{curve.source} (batch {curve.batch:,}, learning rate {rate})"
    passed = next((s for s in progress.scores if passes({"FID": s[1], "CLIP": s[2]})), None)
    goal = f"the mean of {who} passes at {curve.passes_at:,}"
    if not progress.scores:
        return f"No checkpoint is scored yet; {goal}."
    samples, fid, clip, n = progress.scores[-1]
    if n != EVAL_SAMPLES:
        return (
            f"Scores are of {n:,} pictures and those of {who} of {EVAL_SAMPLES:,}; FID falls as n "
            "grows, so they are not compared."
        )
    if passed:
        return f"Has converged: the checkpoint of {passed[0]:,} samples passes; {goal}."
    expected = curve.expected(samples)
    if expected is None:
        return f"No published score is of {samples:,} samples; {goal}."
    late_fid, late_clip = _behind(fid, clip, expected)
    place = (
        f"at {samples:,} samples FID is {fid:.1f} and CLIP {clip:.4f}, and "
        f"{expected[0]:.1f} +- {2 * FID_DEVIATION * expected[0]:.1f} and "
        f"{expected[1]:.4f} +- {2 * CLIP_DEVIATION:.3f} are those of published runs"
    )
    if late_fid or late_clip:
        which = " and ".join(
            name for name, late in (("FID", late_fid), ("CLIP", late_clip)) if late
        )
        return f"Behind in {which}: {place}; {goal}."
    return f"On its way: {place}; {goal}."


def _behind(fid: float, clip: float, expected: tuple[float, float]) -> tuple[bool, bool]:
    """Whether FID and CLIP score are worse than the band."""
    return (
        fid > expected[0] * (1 + 2 * FID_DEVIATION),
        clip < expected[1] - 2 * CLIP_DEVIATION,
    )


def _loss_in_words(progress: Progress) -> str:
    """The newest losses against the published ones; empty where those are of another batch."""
    if progress.batch != LOSS_BATCH or not progress.losses:
        return ""
    newest = progress.losses[-SMALL_WINDOW:]
    step, loss = newest[-1][0] // progress.batch, statistics.median(loss for _, loss in newest)
    expected = expected_loss(step)
    if expected is None:
        return ""
    low, high = expected - 2 * LOSS_DEVIATION, expected + 2 * LOSS_DEVIATION
    state = "above" if loss > high else "below" if loss < low else "within"
    return (
        f"The loss at step {step:,} is {loss:.3f} (median of {len(newest)} logged steps), {state} "
        f"the {low:.3f} to {high:.3f} of published runs."
    )


def expected_loss(step: int) -> float | None:
    """Mean loss of published runs at a step; None before the first and after the last one known."""
    if not LOSSES[0][0] <= step <= LOSSES[-1][0]:
        return None
    right = bisect_left([at for at, _ in LOSSES], step)
    (left_at, left), (at, loss) = LOSSES[max(right - 1, 0)], LOSSES[right]
    return left + (loss - left) * ((step - left_at) / (at - left_at) if at != left_at else 0.0)
