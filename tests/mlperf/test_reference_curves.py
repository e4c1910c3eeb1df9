"""Whether a run is on the way of published runs, in words."""

from __future__ import annotations

import pytest

from sd_perf.mlperf.reference_curves import CURVES, LOSSES, Progress, expected_loss, verdict


def run(*scores, batch=512, rate=1.25e-7, **more) -> Progress:
    lines = [(*score, 30_000)[:4] for score in scores]
    return Progress("a", batch, rate, lines, **more)


@pytest.mark.parametrize("curve", CURVES, ids=lambda c: f"{c.batch}-{c.base_learning_rate:g}")
def test_published_means_are_on_their_own_way(curve):
    for at, fid, clip in curve.points:
        assert curve.expected(at) == (fid, clip)
        progress = run((at, fid, clip), batch=curve.batch, rate=curve.base_learning_rate)
        state = "Has converged" if fid <= 90 and clip >= 0.15 else "On its way"
        assert verdict(progress).startswith(state), at
    assert curve.expected(curve.points[0][0] - 1) is curve.expected(curve.points[-1][0] + 1) is None
    assert curve.passes_at in [point[0] for point in curve.points]


def test_between_two_points():
    curve = next(c for c in CURVES if (c.batch, c.base_learning_rate) == (512, 1.25e-7))
    assert curve.expected(1_280_000) == pytest.approx(((159.9 + 113.7) / 2, (0.1013 + 0.1346) / 2))
    assert expected_loss(100) == 1.09 and expected_loss(150) == pytest.approx((1.09 + 0.709) / 2)
    assert expected_loss(99) is expected_loss(5001) is None


@pytest.mark.parametrize(
    ("progress", "words"),
    [
        (run((1_536_000, 140.0, 0.135)), "Behind in FID: at 1,536,000 samples FID is 140.0"),
        (run((1_536_000, 113.0, 0.115)), "Behind in CLIP: "),
        (run((1_536_000, 140.0, 0.1)), "Behind in FID and CLIP: "),
        (run((1_536_000, 95.0, 0.16)), "On its way: "),
        (run(), "No checkpoint is scored yet; the mean of MLCommons' reference"),
        (run((100, 300.0, 0.1)), "No published score is of 100 samples"),
        (run((1_536_000, 50.0, 0.2, 256)), "Scores are of 256 pictures"),
        (run(batch=384), "No runs of batch 384 are published as a measure"),
        (run(other_world="its data are synthetic"), "No published run is a measure for this one"),
        (run(rate=2.3e-7), "submissions of v5.0 (batch 512"),
        (run(rate=0.0), "No checkpoint is scored yet"),
    ],
)
def test_words(progress, words):
    assert words in verdict(progress)


@pytest.mark.parametrize(("factor", "state"), [(1.0, "within"), (1.5, "above"), (0.5, "below")])
def test_loss(factor, state):
    losses = [(step * 512, loss * factor) for step, loss in LOSSES[:8]]
    assert f"{state} the " in verdict(run(losses=losses[-1:]))
    assert "The loss at step 1,000 is" in verdict(run(losses=losses))
    assert "The loss" not in verdict(run(losses=losses, batch=256))
    assert "The loss" not in verdict(run(losses=[(512, 1.0)]))
