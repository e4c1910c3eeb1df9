"""The least memory of a step, and no more than a step takes."""

from __future__ import annotations

from dataclasses import replace

from sd_perf.config import Config
from sd_perf.training.memory import least_bytes, state_bytes


def test_least_bytes(make_config):
    config = make_config()
    few = least_bytes(config, world_size=1)
    per_sample = 4 * 3 * 4 * 64 + 2 * 2 * 32 * 64
    assert (few - 4 * per_sample) % 16 == 0
    assert few - least_bytes(config, world_size=4) == 3 * per_sample
    data = {"format": "raw", "path": "a", "autoencoder": "a.ckpt", "latent_size": 8}
    pictures = make_config(data=data, text_encoder={"weights": "random"})
    assert least_bytes(pictures, world_size=1) - few == 4 * 4 * 3 * 64 * 64
    drawing = least_bytes(make_config(sampling={"every_samples": 8}), world_size=1) - few
    assert drawing == state_bytes(config, 1)["weights"]
    wider = make_config(model={"model_channels": 64})
    assert least_bytes(wider, world_size=1) > 3 * few


def test_state_of_stable_diffusion():
    """865,910,724 parameters: 16 bytes each in float32, 14 where masters are split."""
    plain = Config()
    fast = replace(plain, model=replace(plain.model, implementation="fast"))
    N = 865_910_724
    assert sum(state_bytes(plain, 8).values()) == 16 * N
    assert sum(state_bytes(fast, 1).values()) == 14 * N
    divided = {"weights": 2 * N + 2 * (N // 8), "gradients": 2 * N, "adamw_moments": 8 * (N // 8)}
    assert state_bytes(fast, 8) == divided
    averaged = replace(fast, training=replace(fast.training, ema_decay=0.9999))
    assert state_bytes(averaged, 8) == {**divided, "ema": 4 * (N // 8)}
    summed = replace(fast, training=replace(fast.training, accumulate_steps=2, strategy="ddp"))
    assert state_bytes(summed, 8) == {"weights": 4 * N, "gradients": 4 * N, "adamw_moments": 8 * N}
