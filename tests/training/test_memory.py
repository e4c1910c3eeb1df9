"""The least memory of a step, and no more than a step takes."""

from __future__ import annotations

from sd_perf.training.memory import least_bytes


def test_least_bytes(make_config):
    config = make_config()
    few = least_bytes(config, world_size=1)
    per_sample = 4 * 3 * 4 * 64 + 2 * 2 * 32 * 64
    assert (few - 4 * per_sample) % 16 == 0
    assert few - least_bytes(config, world_size=4) == 3 * per_sample
    wider = make_config(model={"model_channels": 64})
    assert least_bytes(wider, world_size=1) > 3 * few
