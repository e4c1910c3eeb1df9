"""The closed division: what is free, what is fixed, and what is refused."""

import dataclasses
from pathlib import Path

import pytest

from sd_perf.config import Config
from sd_perf.distributed.world import start_world
from sd_perf.errors import ConfigError
from sd_perf.mlperf.rules import FIXED, require_closed, violations
from sd_perf.presets import load_preset
from sd_perf.training.launch import launch

OTHERS = {
    "model": {
        "model_channels": 640,
        "resblock_groups": 32,
        "context_dim": 768,
        "num_res_blocks": 3,
        "init": "a.ckpt",
    },
    "diffusion": {
        "num_timesteps": 999,
        "beta_start": 1e-4,
        "beta_end": 0.02,
        "latent_scale": 1.0,
        "prediction": "epsilon",
        "offset_noise": 0.1,
        "zero_terminal_snr": True,
    },
    "data": {
        "latent_size": 96,
        "context_tokens": 76,
        "allow_empty_captions": False,
        "max_bad_samples": 1,
        "drop_captions": 0.1,
    },
    "text_encoder": {"model": "ViT-L-14", "weights": "random"},
    "optimizer": {
        "beta_1": 0.95,
        "beta_2": 0.99,
        "epsilon": 1e-6,
        "weight_decay": 0.0,
        "warmup_start": 0.0,
        "decay_steps": 1000,
        "decay_shape": "cosine",
    },
    "training": {"seed": 0, "max_samples": 1_000_000, "ema_decay": 0.999, "min_snr_gamma": 5.0},
    "checkpoint": {"every_samples": 256_000, "keep": 2},
    "sampling": {"steps": 20, "guidance_scale": 7.5},
    "mlperf": {"caches_cleared": False},
    "evaluation": {"num_prompts": 10_000},
}


@pytest.mark.parametrize("name", ["train_512", "train_512_encoded", "train_512_moments"])
def test_the_benchmarks_presets_comply(name):
    preset = load_preset(Path(__file__).parents[2] / f"configs/{name}.yaml")
    mlperf = dataclasses.replace(preset.mlperf, division="closed", caches_cleared=True)
    require_closed(dataclasses.replace(preset, mlperf=mlperf))


def test_free_values_are_free(closed):
    require_closed(closed(optimizer={"base_learning_rate": 2.8e-7, "warmup_steps": 500}))
    for batch, every in (
        (256, 512_000),
        (384, 512_256),
        (384, 512_000),
        (576, 512_064),
        (1536, 513_024),
    ):
        require_closed(
            closed(training={"global_batch_size": batch}, checkpoint={"every_samples": every})
        )
    require_closed(
        closed(
            training={"precision": "fp32", "accumulate_steps": 4}, data={"context": "precomputed"}
        )
    )


def test_speed_and_fp8_are_free(closed):
    speed = {"implementation": "fast", "activation_checkpointing": True, "compile": True}
    require_closed(closed(model=speed))
    require_closed(closed(model=speed, precision={"linear": "fp8_native", "text": "bf16"}))
    require_closed(
        closed(
            model={"implementation": "fast"},
            precision={"linear": "fp8_te", "fp8_recipe": "delayed"},
        )
    )


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [(section, key, value) for section, keys in OTHERS.items() for key, value in keys.items()],
)
def test_fixed_values_are_fixed(closed, section, key, value):
    config = closed(**{section: {key: value}})
    with pytest.raises(
        ConfigError,
        match=rf"^{section}\.{key}: {value!r} is not allowed in the closed division, .*: ",
    ):
        require_closed(config)
    assert [key for key, *_ in violations(config)] == [f"{section}.{key}"]


def test_synthetic_data_is_no_benchmark(closed):
    assert [key for key, *_ in violations(closed(data={"format": "synthetic"}))] == ["data.format"]


@pytest.mark.parametrize("format", ["raw", "encoded"])
def test_the_range_of_pixels_is_the_references(closed, format):
    data = {"format": format, "autoencoder": "a.ckpt", "image_range": "correct"}
    assert [key for key, *_ in violations(closed(data=data))] == ["data.image_range"]
    require_closed(closed(data={**data, "image_range": "benchmark"}))


@pytest.mark.parametrize("name", ["random_flip", "random_crop"])
def test_pictures_are_seen_as_they_are(closed, name):
    raw = {"format": "raw", "autoencoder": "a.ckpt", "image_range": "benchmark", name: True}
    assert [key for key, *_ in violations(closed(data=raw))] == [f"data.{name}"]


def test_cadence_follows_the_batch(closed):
    config = closed(training={"global_batch_size": 384}, checkpoint={"every_samples": 512_640})
    with pytest.raises(
        ConfigError, match=r"checkpoint\.every_samples: 512640 .*512,256.*CEIL\(512000 / 384\)"
    ):
        require_closed(config)


def test_every_rule_names_a_key():
    config = Config()
    for key in FIXED:
        section, name = key.split(".")
        assert hasattr(getattr(config, section), name), key


def test_a_run_that_cannot_comply_leaves_no_folder(closed, tmp_path):
    config = closed(run={"dir": str(tmp_path / "run")}, training={"seed": 3, "device": "cpu"})
    with pytest.raises(ConfigError, match=r"training\.seed: 3"):
        launch(config, start_world("cpu"), resume=False, fresh=False, console=None)  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()
