"""The synthetic loader: samples are functions of seed and number."""

from itertools import islice

import numpy as np
import torch

from sd_perf.config import DataConfig
from sd_perf.data.batch import LoaderOptions
from sd_perf.data.loaders.synthetic import SyntheticLoader, draw_inputs

CONFIG = DataConfig(format="synthetic", latent_size=8, context_tokens=3)


def loader(world=1, rank=0, accumulate=1, num_samples=20, seed=1):
    split = {
        "global_batch_size": 12,
        "micro_batch_size": 12 // world // accumulate,
        "rank": rank,
        "world_size": world,
    }
    return SyntheticLoader(
        CONFIG, LoaderOptions(seed=seed, context_dim=16, **split), num_samples=num_samples
    )


def take(steps=4, **split):
    """{position: (moments, context, caption)} over all ranks."""
    rows = {}
    for rank in range(split.get("world", 1)):
        for batch in islice(
            loader(rank=rank, **split).batches(0), steps * split.get("accumulate", 1)
        ):
            for row, position in enumerate(batch.sample_indices.tolist()):
                rows[position] = (batch.moments[row], batch.context[row], batch.captions[row])
    return rows


def test_every_split_sees_the_same_samples():
    whole = take()
    assert sorted(whole) == list(range(48))
    for split in ({"world": 2}, {"world": 3, "accumulate": 2}):
        part = take(**split)
        assert sorted(part) == sorted(whole)
        for position, (moments, context, caption) in part.items():
            assert torch.equal(moments, whole[position][0]) and torch.equal(
                context, whole[position][1]
            )
            assert caption == whole[position][2] == f"synthetic sample {position % 20}"


def test_samples_repeat_by_epoch_and_differ_within():
    rows = take()
    assert torch.equal(rows[3][0], rows[23][0]) and torch.equal(rows[3][1], rows[43][1])
    assert not torch.equal(rows[3][0], rows[4][0])
    assert not torch.equal(take(steps=1, seed=2)[0][0], rows[0][0])


def test_statistics():
    batch = next(loader(num_samples=1000).batches(0))
    assert batch.moments.shape == (12, 8, 8, 8) and batch.context.shape == (12, 3, 16)
    mean, log_variance = batch.moments.chunk(2, dim=1)
    assert (log_variance == -8).all()
    variance = 0.18215**2 * (mean.var() + log_variance.exp().mean())
    assert abs(float(variance) - 1) < 4 * (2 / mean.numel()) ** 0.5
    assert abs(float(batch.context.var()) - 1) < 4 * (2 / batch.context.numel()) ** 0.5
    same_elements = np.corrcoef(mean.flatten(1)[:, :48].flatten(), batch.context.flatten())
    assert abs(float(same_elements[0, 1])) < 0.2


def test_fingerprint_tells_data_apart():
    assert loader().fingerprint == loader(world=2).fingerprint
    assert (
        len({loader().fingerprint, loader(seed=2).fingerprint, loader(num_samples=21).fingerprint})
        == 3
    )


def test_a_sample_is_what_draw_inputs_gives():
    batch = next(loader(seed=5).batches(0))
    moments, context = draw_inputs(5, torch.tensor([3]), (4, 8, 8), (3, 16))
    assert torch.equal(batch.moments[3:4], moments) and torch.equal(batch.context[3:4], context)
