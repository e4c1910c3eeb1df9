"""`sd-perf verify` and `sd-perf convert-checkpoints` at the command line."""

from __future__ import annotations

import json
import re
import shlex
import shutil

import pytest
import torch.distributed.checkpoint as dcp

from sd_perf.runs.checkpoint_files import read_state
from sd_perf.runs.checkpoints import load_component
from tests.cli.bad_input import command_on, matches, newest, saved


def test_verify(copied_run, sd_perf, refused, tmp_path):
    before = saved(copied_run)
    code, output, _ = sd_perf("verify", copied_run)
    assert code == 0 and output.splitlines()[-1] == f"{newest(copied_run)}: good"
    assert saved(copied_run) == before
    file = newest(copied_run) / "model_00000_of_00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    code, output, _ = sd_perf("verify", copied_run)
    assert code == 1 and output.splitlines()[0].endswith("samples_0000000004: good")
    matches(output, f"{file}: truncated")
    matches(refused("verify", tmp_path), "is no run folder")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_convert(copied_run, preset, sd_perf):
    """A run with a checkpoint of the old format: refused with the command that mends it."""
    path = newest(copied_run)
    state = read_state(path)
    stored = {
        f"{component}.{name}": tensor.clone()
        for component in ("model", "exp_avg", "exp_avg_sq")
        for name, tensor in load_component(path, component).items()
    }
    shutil.rmtree(path)
    dcp.save(stored, storage_writer=dcp.FileSystemWriter(path), no_dist=True)
    kept = ("samples", "steps", "seed", "bad_samples", "dataset", "callbacks")
    (path / "state.json").write_text(json.dumps({key: state[key] for key in kept}))

    command = command_on(copied_run, "resume", preset, copied_run)
    code, _, errors = sd_perf(*command)
    advice = re.search("`sd-perf (.*)`", errors)
    assert code == 2 and advice is not None
    code, output, _ = sd_perf(*shlex.split(advice[1]))
    moved = path.with_name(f"old_format_{path.name}")
    assert code == 0 and output == f"{path}: converted; the old one is now {moved}\n"
    assert sd_perf("verify", copied_run)[0] == 0
    assert load_component(path, "exp_avg").keys() == load_component(path, "model").keys()
    code, output, _ = sd_perf(*command)
    assert code == 0 and "resuming at sample 8 of 12" in output
    code, output, _ = sd_perf(*shlex.split(advice[1]))
    assert code == 0 and output == f"{copied_run}: holds no checkpoint of the old format\n"
