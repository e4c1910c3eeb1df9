"""What docs/performance.md says is what the model says."""

from __future__ import annotations

import re

import pytest

from sd_kernels.registry import all_ops
from sd_perf.config import Config, TrainingConfig
from sd_perf.tools.estimate import predict as prediction
from sd_perf.tools.estimate.predict import operators, predict
from tests.tools.estimate.test_estimate import PUBLISHED_ROW, ROOT, predicted, traced

PAGE = (ROOT / "docs/performance.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def one_eager_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """The eager way is not looked at here: one batch's kernels stand for every batch's."""
    monkeypatch.setattr(prediction, "plain", lambda config, batch: traced(config, 64))


def test_the_documented_rates_of_submissions_are_those_of_the_model() -> None:
    rows = PUBLISHED_ROW.findall(PAGE)
    assert len(rows) >= 10
    for gpu, batch, nodes, gpus, published, rate, error in rows:
        ranks = int(nodes) * int(gpus)
        facts = predict(Config(), gpu.lower(), int(batch), ranks, int(nodes))
        ours = facts["recipes"]["submission"]["samples_per_second"]
        assert f"{ours:.1f}" == rate, (gpu, batch)
        assert f"{100 * (ours / float(published) - 1):.0f}" == error


@pytest.mark.slow
def test_the_documented_rates_of_several_gpus_are_those_of_the_model() -> None:
    rows = re.findall(r"\| (\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \|", PAGE)
    assert len(rows) == 4
    for ranks, batch, *documented in rows:
        for strategy, rate in zip(("zero1", "ddp"), documented, strict=True):
            config = Config(training=TrainingConfig(strategy=strategy))
            facts = predict(config, "h100", int(batch), int(ranks), int(ranks) // 8)
            assert f"{facts['samples_per_second']:.1f}" == rate, (ranks, strategy)


def test_the_documented_figures_by_op_are_those_of_the_model() -> None:
    recipes = predicted("h100", 64)["recipes"]
    for op, *cells in re.findall(
        r"\| (\w+) \| ([\d.]*) \| ([\d.]*) \| ([\d.]*) \| ([\d.]*) \| ([\d.]*) \| ([\d.]*) \|", PAGE
    ):
        rows = [recipe["by_op"].get(op) for recipe in recipes.values()]
        ours = [row and f"{row[key]:.3f}" for key in ("ms_per_sample", "gigabytes") for row in rows]
        assert cells == [cell or "" for cell in ours], op
    rows = [row for family in operators().values() for row in family]
    besides = ["average", "communication", "elementwise", "waiting"]
    assert sorted(rows) == sorted([*all_ops(), *besides])
