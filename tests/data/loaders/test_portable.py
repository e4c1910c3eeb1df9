"""The portable loader: order, splits over ranks and workers, bad samples, threads."""

import os
import threading
import time
from itertools import islice
from pathlib import Path

import pytest
import torch

from sd_perf.config import DataConfig
from sd_perf.data import threads
from sd_perf.data.batch import Batch, LoaderOptions
from sd_perf.data.loaders.portable import PortableLoader
from sd_perf.data.order import SampleOrder
from sd_perf.errors import BadSampleError, DataError
from tests.waiting import PATIENCE, wait_for

SEED, GLOBAL_BATCH, NUM = 7, 6, 10
STEPS = 5
"""30 positions: three epochs of ten, whose borders fall inside steps of six"""


def loader(config, world=1, rank=0, accumulate=1, **more) -> PortableLoader:
    micro = GLOBAL_BATCH // world // accumulate
    split = {
        "global_batch_size": GLOBAL_BATCH,
        "micro_batch_size": micro,
        "rank": rank,
        "world_size": world,
    }
    return PortableLoader(config, LoaderOptions(seed=SEED, context_dim=5, **split, **more))


def take(config, world=1, accumulate=1, position=0, steps=STEPS) -> list[Batch]:
    """Batches of all ranks from a position on."""
    batches = []
    for rank in range(world):
        stream = loader(config, world, rank, accumulate).batches(position)
        batches += islice(stream, steps * accumulate)
        stream.close()
    return batches


def delivered(batches: list[Batch]) -> list[tuple[int, int, str]]:
    """(position, sample, caption) of all samples in the batches, sorted by position."""
    rows = []
    for batch in batches:
        samples = batch.moments[:, 0, 0, 0].int().tolist()
        rows += zip(batch.sample_indices.tolist(), samples, batch.captions, strict=True)
    return sorted(rows)


def test_batches_hold_what_the_shards_hold(make_shards):
    for batch in take(make_shards(NUM), accumulate=2):
        assert batch.sample_indices.dtype == torch.int64 and batch.sample_indices.shape == (3,)
        assert batch.moments.dtype == torch.float32 and batch.moments.shape == (3, 8, 2, 2)
        assert batch.context.dtype == torch.float32 and batch.context.shape == (3, 3, 5)
        samples = batch.moments[:, 0, 0, 0]
        assert (batch.moments == samples[:, None, None, None]).all()
        assert (batch.context == -samples[:, None, None]).all()
        assert batch.captions == [f"caption {int(sample)}" for sample in samples]
        assert batch.replacements == []


def test_without_text_states(make_shards):
    fields = {**make_shards(NUM, context=False).__dict__, "context": "open_clip"}
    batch = take(DataConfig(**fields), steps=1)[0]
    assert batch.context is None and len(batch.captions) == 6


@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_epoch_delivers_every_sample_once(make_shards, world):
    rows = delivered(take(make_shards(NUM), world))
    assert [position for position, *_ in rows] == list(range(30))
    epochs = [[sample for _, sample, _ in rows[start : start + NUM]] for start in (0, 10, 20)]
    assert all(sorted(epoch) == list(range(NUM)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_the_same_at_every_split(make_shards):
    config = make_shards(NUM)
    order = SampleOrder(SEED, NUM)
    expected = [(p, order.sample(p), f"caption {order.sample(p)}") for p in range(30)]
    for world, accumulate in [(1, 1), (1, 6), (2, 1), (2, 3), (3, 2), (6, 1)]:
        assert delivered(take(config, world, accumulate)) == expected


@pytest.mark.parametrize("world", [1, 3])
def test_resume_is_the_tail(make_shards, world):
    config = make_shards(NUM)
    whole = delivered(take(config, world))
    for step in range(1, STEPS):
        assert (
            delivered(take(config, world, 1, step * GLOBAL_BATCH, STEPS - step))
            == whole[step * GLOBAL_BATCH :]
        )


@pytest.mark.parametrize(("workers", "ahead"), [(1, 1), (4, 2), (3, 9)])
def test_order_does_not_depend_on_the_threads(make_shards, monkeypatch, workers, ahead):
    config = make_shards(NUM, workers=workers, prefetch_batches=ahead)
    source = loader(config, accumulate=6)
    read = source._quick.read

    def slow_for_even(sample, parts):
        time.sleep(0.005 * (sample % 2 == 0))
        return read(sample, parts)

    monkeypatch.setattr(source._quick, "read", slow_for_even)
    stream = source.batches(0)
    assert [int(batch.sample_indices) for batch in islice(stream, 30)] == list(range(30))
    stream.close()


def test_made_ahead_but_not_further(make_shards, monkeypatch):
    source = loader(make_shards(NUM, prefetch_batches=3), accumulate=6)
    reads = []
    read = source._quick.read
    monkeypatch.setattr(source._quick, "read", lambda *which: reads.append(which) or read(*which))
    stream = source.batches(0)
    next(stream)
    wait_for(lambda: len(reads) >= 4)
    time.sleep(0.2)
    assert len(reads) == 4
    stream.close()


def test_batches_are_made_in_page_locked_memory(make_shards, monkeypatch):
    """That needs a GPU, so only the calls that ask for it are checked."""
    asked, empty = [], torch.empty

    def spy(*shape, pin_memory, **options):
        asked.append((shape, pin_memory))
        return empty(*shape, **options)

    config = make_shards(NUM, bad=range(5), max_bad_samples=9)
    plain = take(config, steps=1)
    monkeypatch.setattr(torch, "empty", spy)
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda tensor: asked.append((tensor.shape, True)) or tensor
    )
    source = loader(config, device=torch.device("cuda"))
    batch = source.make(next(source._options.positions(0)))
    assert asked == [((6,), True), ((6, 8, 2, 2), True), ((6, 3, 5), True)]
    assert delivered([batch]) == delivered(plain) and replaced([batch]) == replaced(plain) != []
    assert torch.equal(batch.context, plain[0].context)


def alive() -> int:
    return sum(thread.name.startswith("sd_perf_data") for thread in threading.enumerate())


@pytest.mark.parametrize("end", ["close", "forget"])
def test_threads_end_with_the_iterator(make_shards, end):
    stream = loader(make_shards(NUM)).batches(0)
    next(stream)
    assert alive() > 0
    if end == "close":
        stream.close()
    del stream
    assert alive() == 0


def test_closing_does_not_finish_what_was_planned(make_shards, monkeypatch):
    source = loader(make_shards(NUM, workers=1, prefetch_batches=20), accumulate=6)
    reads, closing = [], threading.Event()
    read = source._quick.read

    def held(sample, parts):
        reads.append(sample)
        assert len(reads) == 1 or closing.wait(PATIENCE)
        return read(sample, parts)

    class Pool(threads.ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            super().shutdown(wait=False, cancel_futures=cancel_futures)
            closing.set()
            super().shutdown(wait=wait)

    monkeypatch.setattr(source._quick, "read", held)
    monkeypatch.setattr(threads, "ThreadPoolExecutor", Pool)
    stream = source.batches(0)
    next(stream)
    stream.close()
    assert len(reads) <= 2  # what the step took, and the one under way


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_descriptors_close_with_the_loader(make_shards):
    config = make_shards(NUM)
    before = descriptors()
    source = loader(config)
    assert descriptors() == before + 3
    del source
    assert descriptors() == before


def replaced(batches: list[Batch]) -> list[tuple[int, str, str]]:
    return sorted(
        (r.sample_index, r.key, r.reason) for batch in batches for r in batch.replacements
    )


def test_replacement_is_the_next_good_sample_at_every_world_size(make_shards):
    order = SampleOrder(SEED, NUM)
    # two in a row, one of them the last of its epoch, and one alone
    bad = {order.sample(8), order.sample(9), order.sample(3)}
    config = make_shards(NUM, bad=bad, max_bad_samples=100)

    def good(position):
        while order.sample(position) in bad:
            position += 1
        return order.sample(position)

    for world, accumulate in [(1, 1), (2, 1), (3, 2), (6, 1)]:
        batches = take(config, world, accumulate)
        assert [row[:2] for row in delivered(batches)] == [(p, good(p)) for p in range(30)]
        culprits = [(p, order.sample(p)) for p in range(30) if order.sample(p) in bad]
        assert len(culprits) == 9
        assert replaced(batches) == [
            (
                p,
                f"{s // 4:05d}{s % 4:04d} in {s // 4:05d}.tar",
                "moments has values that are NaN or infinite",
            )
            for p, s in culprits
        ]


def test_a_bad_sample_stops_where_none_is_allowed(make_shards):
    config = make_shards(NUM, bad=[6])
    with pytest.raises(
        BadSampleError, match=r"000010002 in 00001\.tar: moments has .* NaN .*data\.max_bad_samples"
    ):
        take(config)


def test_all_bad(make_shards):
    with pytest.raises(DataError, match="10 samples in a row are bad") as error:
        take(make_shards(NUM, bad=range(NUM), max_bad_samples=1000))
    assert not isinstance(error.value, BadSampleError)


def test_shard_that_shrinks_under_the_loader(make_shards):
    config = make_shards(NUM)
    source = loader(config)
    os.truncate(Path(config.path) / "00001.tar", 600)
    with pytest.raises(BadSampleError, match="shrank since it was indexed"):
        list(islice(source.batches(0), 2))


def test_position_must_be_a_step_border(make_shards):
    with pytest.raises(ValueError, match="position 3"):
        loader(make_shards(NUM)).batches(3)


def test_missing_context_is_told_at_the_start(make_shards):
    with pytest.raises(DataError, match="context"):
        loader(make_shards(NUM, context=False))
