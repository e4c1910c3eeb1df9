"""Every checkpoint of a run is checked; one that is damaged does not hide the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from sd_perf.errors import CheckpointError, UserError
from sd_perf.runs.folder import open_run, read_run_id
from sd_perf.runs.verify import verify_run
from tests.runs.test_checkpoints import CheckpointStore, reseal, tensors, training_state


@pytest.fixture
def run(make_config) -> Path:
    """A run with checkpoints at 10, 20 and 30 samples."""
    config = make_config()
    open_run(config, resume=False)
    folder = Path(config.run.dir)
    store = CheckpointStore(folder / "checkpoints")
    for samples in (10, 20, 30):
        store.save(tensors(), {**training_state(samples), "run_id": read_run_id(folder)})
    store.wait()
    return folder


def test_good(run):
    names = [(path.name, fault) for path, fault in verify_run(run)]
    assert names == [(f"samples_00000000{n}", "") for n in (10, 20, 30)]


@pytest.mark.parametrize("component", ["model", "exp_avg"])
def test_damaged(component, run):
    file = run / "checkpoints" / "samples_0000000020" / f"{component}_00000_of_00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 16
    file.write_bytes(data)
    faults = [fault for _, fault in verify_run(run)]
    assert faults[0] == faults[2] == "" and f"{file}: damaged" in faults[1]


def test_of_another_run(run):
    path = run / "checkpoints" / "samples_0000000030"
    reseal(path, lambda state: state.update(run_id="other"))
    assert "is of another run (other" in list(verify_run(run))[-1][1]


def test_nothing_to_verify(tmp_path, make_config):
    with pytest.raises(UserError, match="is no run folder"):
        list(verify_run(tmp_path))
    open_run(make_config(), resume=False)
    with pytest.raises(CheckpointError, match="holds no complete checkpoint to verify"):
        list(verify_run(tmp_path / "run"))
