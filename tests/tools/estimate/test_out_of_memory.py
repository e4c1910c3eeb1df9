"""Out of memory is one sentence, with the batch that fits."""

from __future__ import annotations

import pytest
import torch

from sd_perf.distributed.world import World
from sd_perf.tools.estimate.out_of_memory import largest_micro_batch, out_of_memory
from sd_perf.training.plain_step import PlainStep

CPU = "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError(CPU), MemoryError()]
)
def test_a_step_that_does_not_fit(error, preset, refused, monkeypatch):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(PlainStep, "__call__", fail)
    told = refused("train", "--config", preset, "--run.dir", preset.parent / "run")
    assert told.startswith("sd-perf: out of memory with 4 samples at a time on cpu; 2 fit by ")
    assert "--training.accumulate-steps 2 " in told


@pytest.mark.slow
def test_the_batch_that_fits_grows_with_memory(make_config):
    config = make_config()
    sizes = [largest_micro_batch(config, 1, size * 2**20) for size in (1, 100, 200)]
    assert sizes[0] == 0 < sizes[1] < sizes[2]


def test_nothing_fits(make_config):
    world = World(rank=0, size=1, device=torch.device("cpu"))
    config = make_config(training={"global_batch_size": 1})
    assert "no sample fits" in str(out_of_memory(config, world))
