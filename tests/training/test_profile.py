"""A profile of a few steps: a trace, and tables with operators of both kinds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sd_perf.config import ProfileConfig
from sd_perf.console import TextConsole
from sd_perf.distributed.world import World, start_world
from sd_perf.errors import ConfigError
from sd_perf.tools.estimate import out_of_memory as module
from sd_perf.training.callbacks.profile import ProfileSteps
from sd_perf.training.launch import launch


def test_steps_of_the_fast_network(make_config, capsys) -> None:
    config = make_config(
        model={"implementation": "fast"}, training={"max_samples": 16}, profile={"steps": "1:3"}
    )
    console = TextConsole(width=200)
    launch(config, start_world("cpu"), resume=False, fresh=False, console=console)
    folder = Path(config.run.dir) / "profile"
    assert sorted(path.name for path in folder.iterdir()) == [
        "steps_000001_000003.trace.json",
        "steps_000001_000003.txt",
    ]
    events = json.loads((folder / "steps_000001_000003.trace.json").read_text())["traceEvents"]
    names = [event.get("name") for event in events]
    assert names.count("sd_kernels.adamw") == 2 and "aten::convolution_backward" in names
    ours, others = (folder / "steps_000001_000003.txt").read_text().split("operator, without")
    assert "operator of sd_kernels, backward pass left out (CPU, 2 steps)" in ours
    assert "        1.0  sd_kernels.adamw" in ours and "sd_kernels.group_norm" in ours
    assert "aten::" in others and "aten::" not in ours
    output = capsys.readouterr().out
    assert "profile.steps: steps 1 to 2 are recorded, and are slower" in output


def test_steps_that_do_not_come_are_told(make_config, make_trainer) -> None:
    told: list[str] = []
    config = make_config(training={"max_samples": 8}, profile={"steps": "2:3"})
    make_trainer(config, [ProfileSteps(told.append)]).fit()
    why = "profile.steps: step 2 does not come (the run goes from step 0 to 2)"
    assert told == [f"{why}; nothing is recorded"]
    assert not (Path(config.run.dir) / "profile").exists()


@pytest.mark.slow
def test_a_run_that_ends_amid_the_steps_leaves_what_it_took(make_config, make_trainer) -> None:
    config = make_config(training={"max_samples": 8}, profile={"steps": "1:9"})
    make_trainer(config, [ProfileSteps(lambda line: None)]).fit()
    assert (Path(config.run.dir) / "profile" / "steps_000001_000002.txt").is_file()


@pytest.mark.parametrize("steps", ["3", "3:3", "4:3", "-1:3", "0:1001", "a:b", "1:2:3", " 1:2"])
def test_what_is_no_range(steps: str) -> None:
    with pytest.raises(ConfigError, match=r"profile\.steps: .* it must be A:B, the first step"):
        ProfileConfig(steps=steps)


def test_a_snapshot_of_gpu_memory_beside_the_sentence(make_config, monkeypatch) -> None:
    import torch

    config = make_config()
    folder = Path(config.run.dir)
    folder.mkdir(parents=True)
    monkeypatch.setattr(module, "_what_fits", lambda config, world: "out of memory; 2 fit")
    world = World(rank=0, size=1, device=torch.device("cuda"))
    dump = torch.cuda.memory
    monkeypatch.setattr(dump, "_dump_snapshot", lambda path: Path(path).write_bytes(b"snapshot"))
    path = folder / "profile" / "memory_rank_0.pickle"
    told = str(module.out_of_memory(config, world))
    assert told.endswith(f"2 fit; what lay in its memory is in {path} (for pytorch.org/memory_viz)")
    assert path.read_bytes() == b"snapshot"

    def fail(path: str) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(dump, "_dump_snapshot", fail)
    assert "could not be written to" in str(module.out_of_memory(config, world))
