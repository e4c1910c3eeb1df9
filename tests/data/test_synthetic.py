from collections import defaultdict
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from sd_perf.config import DataConfig
from sd_perf.data.portable import PortableLoader
from sd_perf.data.synthetic import SyntheticLoader, caption_context, write_synthetic_shards
from sd_perf.errors import DataError

CONFIG = DataConfig(format="synthetic", latent_size=8, context_tokens=3)


def loader(world=1, rank=0, accumulate=1, num_samples=20, seed=1):
    split = {"global_batch_size": 12, "micro_batch_size": 12 // world // accumulate, "rank": rank, "world_size": world}
    return SyntheticLoader(CONFIG, seed=seed, context_dim=16, num_samples=num_samples, **split)


def take(steps=4, **split):
    """position -> (moments, context, caption) over all ranks."""
    rows = {}
    for rank in range(split.get("world", 1)):
        for batch in islice(loader(rank=rank, **split).batches(0), steps * split.get("accumulate", 1)):
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
            assert torch.equal(moments, whole[position][0]) and torch.equal(context, whole[position][1])
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
    assert len({loader().fingerprint, loader(seed=2).fingerprint, loader(num_samples=21).fingerprint}) == 3


def shards_config(folder: Path) -> DataConfig:
    return DataConfig(path=str(folder), latent_size=8, context="precomputed", context_tokens=4)


@pytest.fixture
def shards(tmp_path) -> Path:
    write_synthetic_shards(tmp_path / "patterns", 160, 8, 4, 32, seed=3, samples_per_shard=100)
    return tmp_path / "patterns"


def test_captions_tell_most_of_the_latents(shards):
    """The shards are learnable: knowing the caption removes most of the variance, but not all of it."""
    split = {"global_batch_size": 160, "micro_batch_size": 160}
    batch = next(PortableLoader(shards_config(shards), seed=0, context_dim=32, **split).batches(0))
    latents = 0.18215 * batch.moments[:, :4]
    assert 0.9 < float(latents.var()) < 1.1
    groups = defaultdict(list)
    for caption, latent in zip(batch.captions, latents, strict=True):
        groups[caption].append(latent)
    assert len(groups) == 16 and all(len(group) == 10 for group in groups.values())
    within = sum(float((torch.stack(group) - torch.stack(group).mean(0)).square().sum()) for group in groups.values())
    rest = within / float(latents.square().sum())
    assert 0.005 < rest < 0.2
    for caption, context in zip(batch.captions, batch.context, strict=True):
        assert torch.equal(context, torch.from_numpy(caption_context(caption, 4, 32)).half().float())


def test_same_seed_same_bytes(shards, tmp_path):
    write_synthetic_shards(tmp_path / "again", 160, 8, 4, 32, seed=3, samples_per_shard=100)
    write_synthetic_shards(tmp_path / "other", 160, 8, 4, 32, seed=4, samples_per_shard=100)
    first = (shards / "00001.tar").read_bytes()
    assert (tmp_path / "again" / "00001.tar").read_bytes() == first
    assert (tmp_path / "other" / "00001.tar").read_bytes() != first
    with pytest.raises(DataError, match="exists already"):
        write_synthetic_shards(shards, 160, 8, 4, 32, seed=3)


def test_word_vectors():
    both = caption_context("pattern 3 bright", 5, 16)
    assert both.shape == (5, 16) and both.dtype == np.float32
    assert (both[2] == caption_context("bright", 1, 16)[0]).all() and (both[3] == both[4]).all()
    assert (caption_context("", 5, 16) == both[3]).all()
    assert (caption_context("pattern 3 bright", 2, 16) == both[:2]).all()
    assert not (both[0] == both[1]).any()
