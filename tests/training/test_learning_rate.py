"""The learning rate's golden values: warm-up, then constant or a linear decay."""

from __future__ import annotations

import pytest
import torch

from sd_perf.config import Config, OptimizerConfig
from sd_perf.models.torchvision_schemas import define_missing_torchvision_ops
from sd_perf.training.learning_rate import learning_rate


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 1e-6),
        (1, 1e-6 + (1 - 1e-6) / 1000),
        (500, 0.5000005),
        (999, 0.999000001),
        (1000, 1.0),
        (10**7, 1.0),
    ],
)
def test_warm_up(step, factor):
    full = Config().learning_rate
    assert full == pytest.approx(512 * 1.25e-7)
    assert learning_rate(OptimizerConfig(), full, step) == pytest.approx(full * factor, rel=1e-9)


def test_no_warm_up():
    assert learning_rate(OptimizerConfig(warmup_steps=0), 1e-3, 0) == 1e-3


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (99, 0.99000001),
        (100, 1.0),
        (101, 1 - 0.95 / 400),
        (300, 0.525),
        (500, 0.05),
        (501, 0.05),
        (10**7, 0.05),
    ],
)
def test_decay_begins_after_warm_up_and_ends_at_a_rate_that_is_kept(step, factor):
    config = OptimizerConfig(warmup_steps=100, decay_steps=400, decay_end=0.05)
    assert learning_rate(config, 2e-3, step) == pytest.approx(2e-3 * factor, rel=1e-9)


def test_decay_without_warm_up():
    config = OptimizerConfig(warmup_steps=0, decay_steps=4, decay_end=0.2)
    rates = [learning_rate(config, 1.0, step) for step in range(6)]
    assert rates == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.2])


def test_cosine_is_diffusers():
    define_missing_torchvision_ops()
    from diffusers.optimization import get_cosine_schedule_with_warmup

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    theirs = get_cosine_schedule_with_warmup(optimizer, 10, 50).lr_lambdas[0]
    # Theirs begins at 0 and ends at 0, which a rate here cannot be.
    config = OptimizerConfig(
        warmup_steps=10, warmup_start=0, decay_steps=40, decay_end=1e-30, decay_shape="cosine"
    )
    for step in range(51):
        right = pytest.approx(2e-3 * theirs(step), abs=1e-15)
        assert learning_rate(config, 2e-3, step) == right


def test_cosine_ends_at_a_rate_that_is_kept():
    config = OptimizerConfig(warmup_steps=0, decay_steps=4, decay_end=0.2, decay_shape="cosine")
    rates = [learning_rate(config, 1.0, step) for step in (0, 2, 4, 400)]
    assert rates == pytest.approx([1.0, 0.6, 0.2, 0.2])
