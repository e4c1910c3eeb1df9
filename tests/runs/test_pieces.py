"""Checkpoints of ranks that each hold a part of the state."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from sd_perf.errors import CheckpointError, RankLostError
from sd_perf.runs.checkpoint_files import Piece
from sd_perf.runs.checkpoints import CheckpointStore, load_component, load_tensors
from tests.runs.test_checkpoints import reseal, training_state

FILTERS = torch.arange(60.0).view(5, 4, 3, 1).to(memory_format=torch.channels_last)
"""a tensor whose memory order is not that of its axes"""


def save(store: CheckpointStore, cuts: tuple[int, ...], **whole: torch.Tensor) -> Path:
    """Begin to save what the store's rank holds of FILTERS, as cut in memory order, and `whole`."""
    flat = FILTERS.permute(0, 2, 3, 1).flatten()
    begin, end = (0, *cuts, 60)[store.rank : store.rank + 2]

    def named(copies: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | Piece]:
        piece = Piece.of(FILTERS, copies.pop("share"), begin)
        return {"exp_avg.a": piece, **{f"model.{name}": copy for name, copy in copies.items()}}

    return store.save({"share": flat[begin:end], **whole}, training_state(10), named)


def stores(folder: Path, ranks: int) -> list[CheckpointStore]:
    return [CheckpointStore(folder, writer=(rank, ranks)) for rank in range(ranks)]


def test_pieces_of_several_ranks_are_read_as_one(tmp_path):
    ranks = stores(tmp_path, 3)
    ranks[0].begin()
    for rank in (0, 2, 1):  # the main rank waits for the others
        path = save(ranks[rank], (7, 31), **({"b": torch.ones(2)} if rank == 0 else {}))
    for store in ranks:
        store.wait()
    assert ranks[0].take_saved() == [path] and ranks[1].take_saved() == []
    assert len(list(path.iterdir())) == 5  # three parts, the whole tensor's file, state.json
    loaded = load_tensors(path, {"exp_avg.a": FILTERS, "model.b": torch.zeros(2)})
    assert torch.equal(loaded["exp_avg.a"], FILTERS)
    assert loaded["model.b"].eq(1).all()
    assert torch.equal(load_component(path, "exp_avg")["a"], FILTERS)


def test_a_rank_that_cannot_write_its_part(tmp_path, monkeypatch):
    ranks, full = stores(tmp_path, 2), OSError(28, "No space left on device")
    with monkeypatch.context() as patched:
        patched.setattr("sd_perf.runs.checkpoints.write_shard", Mock(side_effect=full))
        save(ranks[1], (7,))
        with pytest.raises(CheckpointError, match="No space left"):
            ranks[1].wait()
    save(ranks[0], (7,))
    with pytest.raises(CheckpointError, match=r"rank 1 could not write its part: .*No space"):
        ranks[0].wait()
    assert ranks[0].newest() is None
    ranks[0].begin()
    assert not any(tmp_path.iterdir())


def test_a_rank_that_is_gone_is_not_waited_for(tmp_path):
    gone = "rank 1 on here is gone"
    store = CheckpointStore(tmp_path, writer=(0, 2), lost=lambda: gone)
    save(store, (7,))
    with pytest.raises(RankLostError, match=f"{gone}; there is no complete checkpoint yet"):
        store.wait()
    assert store.newest() is None


def test_a_rank_that_is_silent(tmp_path, monkeypatch):
    monkeypatch.setattr("sd_perf.runs.checkpoints.PEER_SECONDS", 0.1)
    store = stores(tmp_path, 2)[0]
    save(store, (7,))
    with pytest.raises(CheckpointError, match="rank 1 wrote nothing in 0 s"):
        store.wait()


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry["pieces"].pop(),
        lambda entry: entry["pieces"][1].update(begin=8),
        lambda entry: entry["pieces"][1].update(begin=6),
        lambda entry: entry["pieces"][0].update(end=0),
        lambda entry: entry["pieces"][0].update(file=entry["pieces"][1]["file"]),
        lambda entry: entry["pieces"].append(dict(entry["pieces"][0])),
        lambda entry: entry.update(shape=[5, 4, 3, 2]),
        lambda entry: entry.update(order=[0, 2, 3, 3]),
        lambda entry: entry.update(order=[0, 1]),
    ],
)
def test_pieces_that_cannot_be(change, tmp_path):
    ranks = stores(tmp_path, 2)
    for rank in (1, 0):
        path = save(ranks[rank], (7,))
        ranks[1].wait()
    ranks[0].wait()
    reseal(path, lambda state: change(state["tensors"]["exp_avg.a"]))
    with pytest.raises(CheckpointError, match=r"the pieces of 'exp_avg\.a' do not make it up"):
        load_component(path, "exp_avg")
