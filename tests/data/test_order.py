"""The order of samples: permutations, splits over ranks, and fixed values."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd_perf.data import order
from sd_perf.data.order import SampleOrder, epoch_order, micro_batches, rank_positions


@given(st.integers(0, 2**63 - 1), st.integers(0, 1000), st.integers(1, 300))
def test_every_epoch_is_a_permutation(seed, epoch, num):
    assert sorted(epoch_order(seed, epoch, num)) == list(range(num))


def test_order_depends_on_seed_and_epoch_and_nothing_else(monkeypatch):
    first = epoch_order(1, 2, 1000)
    assert first.dtype == np.int64
    assert (
        not (first == epoch_order(2, 2, 1000)).all()
        and not (first == epoch_order(1, 3, 1000)).all()
    )
    monkeypatch.setattr(order, "_CHUNK", 7)
    assert (first == epoch_order(1, 2, 1000)).all()


def test_order_is_fixed():
    """A change here would make old checkpoints resume into other data."""
    assert epoch_order(42, 0, 10).tolist() == GOLDEN_0
    assert epoch_order(42, 1, 10).tolist() == GOLDEN_1


GOLDEN_0 = [6, 1, 0, 9, 7, 4, 8, 5, 3, 2]
GOLDEN_1 = [4, 1, 0, 8, 3, 9, 7, 2, 5, 6]


def test_order_looks_random():
    """A sample's place is uniform over many epochs.

    Chi-squared of 16 bins is within 4 sigma of its mean.
    """
    places = np.concatenate([np.argsort(epoch_order(5, epoch, 64))[None] for epoch in range(800)])
    counts = np.stack([np.bincount(places[:, sample] // 4, minlength=16) for sample in range(64)])
    chi_squared = ((counts - 50.0) ** 2 / 50.0).sum()
    freedom = 64 * 15
    assert abs(chi_squared - freedom) < 4 * np.sqrt(2 * freedom)


def test_positions_run_on_across_epochs():
    stream = SampleOrder(3, 7)
    samples = [stream.sample(position) for position in range(21)]
    assert samples == [int(s) for epoch in range(3) for s in epoch_order(3, epoch, 7)]
    assert stream.sample(2) == samples[2]


@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 4), st.integers(0, 5))
def test_ranks_share_a_step(world, micro, accumulate, step):
    batch = world * micro * accumulate
    start = step * batch
    parts = [rank_positions(start, batch, rank, world) for rank in range(world)]
    assert all((part % world == rank).all() for rank, part in enumerate(parts))
    assert np.stack(parts, axis=1).reshape(-1).tolist() == list(range(start, start + batch))
    streams = [micro_batches(start, batch, micro, rank, world) for rank in range(world)]
    made = [np.concatenate([next(stream) for _ in range(accumulate)]) for stream in streams]
    assert all((one == other).all() for one, other in zip(made, parts, strict=True))
    assert [next(stream)[0] for stream in streams] == list(
        range(start + batch, start + batch + world)
    )


@pytest.mark.parametrize(
    "wrong", [(5, 12, 2, 0, 3), (-12, 12, 2, 0, 3), (0, 12, 5, 0, 1), (0, 12, 2, 3, 3)]
)
def test_splits_that_do_not_divide(wrong):
    with pytest.raises(ValueError, match="global batch"):
        micro_batches(*wrong)
