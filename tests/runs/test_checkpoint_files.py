"""Whatever a checkpoint's files hold, reading gives a value or one CheckpointError."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd_perf.errors import CheckpointError
from sd_perf.runs.checkpoint_files import STATE_NAME, read_state
from sd_perf.runs.checkpoints import CheckpointStore, load_component
from sd_perf.runs.convert import read_old_tensors
from tests.runs.test_checkpoints import TENSORS, reseal, save

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> tuple[Path, bytes]:
    """A checkpoint, and its `state.json` as it was written."""
    path = save(CheckpointStore(tmp_path_factory.mktemp("checkpoints")), 10)
    return path, (path / STATE_NAME).read_bytes()


def value_or_one_sentence(path: Path) -> None:
    try:
        load_component(path, "model")
    except CheckpointError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 1000


@settings(deadline=None)
@given(content=st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_state(content, good):
    checkpoint, _ = good
    (checkpoint / STATE_NAME).write_bytes(content)
    with pytest.raises(CheckpointError) as told:
        read_state(checkpoint)
    assert len(str(told.value).splitlines()) == 1


@settings(deadline=None)
@given(data=st.data(), value=JSON)
def test_any_value_with_a_digest_that_fits(data, value, good):
    checkpoint, state = good
    (checkpoint / STATE_NAME).write_bytes(state)
    keys = sorted(json.loads(state).keys() - {"sha256"})
    key = data.draw(st.sampled_from(keys) | st.text(max_size=9))
    reseal(checkpoint, lambda entries: entries.update({key: value}))
    value_or_one_sentence(checkpoint)


@settings(deadline=None)
@given(data=st.data(), value=JSON)
def test_any_entry_of_a_tensor_or_file(data, value, good):
    checkpoint, state = good
    (checkpoint / STATE_NAME).write_bytes(state)
    group, name, keys = data.draw(
        st.sampled_from(
            [
                ("tensors", "model.a", ["file", "shape", "dtype"]),
                ("files", TENSORS, ["size", "sha256"]),
            ]
        )
    )
    key = data.draw(st.sampled_from(keys))
    reseal(checkpoint, lambda entries: entries[group][name].update({key: value}))
    value_or_one_sentence(checkpoint)


@settings(deadline=None)
@given(content=st.binary(max_size=300) | JSON.map(pickle.dumps))
def test_any_metadata_of_the_old_format(content, tmp_path_factory):
    folder = tmp_path_factory.mktemp("old")
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError) as told:
        read_old_tensors(folder)
    assert len(str(told.value).splitlines()) == 1
