"""Training on pictures, on moments made of them, and on encoded shards: the same run."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from sd_perf.config import Config
from sd_perf.data.augmentation import is_dropped
from sd_perf.data.prepare.encode import ShardEncoder
from sd_perf.data.prepare.prepare_shards import prepare_shards, survey_images
from sd_perf.data.prepare.scenes import write_scene_shards
from sd_perf.data.shard_writer import ShardWriter
from sd_perf.errors import CheckpointError, ConfigError
from tests.small_run import small_config, small_trainer

ROOT = Path(__file__).parents[2]
AUTOENCODER = ROOT / "assets" / "tiny" / "autoencoder.safetensors"
STEPS, PICTURES = 20, 12


def config_of(shards: Path, run: Path, format: str, **changes) -> Config:
    """A run on the folder of this name in `shards`; `changes` are keys of `data` and `model`."""
    model = {"context_dim": 128, "implementation": changes.pop("implementation", "plain")}
    data = {
        "format": format,
        "path": str(shards / format),
        "context": "open_clip",
        "context_tokens": 24,
        "autoencoder": str(AUTOENCODER),
        "image_range": "benchmark",
    }
    text = {"model": str(ROOT / "configs" / "text_tiny.json"), "weights": "random"}
    training = {"global_batch_size": 2}
    return small_config(run, model=model, text_encoder=text, data=data | changes, training=training)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders raw, moments and encoded of the same pictures and captions."""
    folder = tmp_path_factory.mktemp("formats")
    write_scene_shards(folder / "raw", PICTURES, seed=0)
    moments = config_of(folder, folder, "moments")
    prepare_shards(moments, survey_images(moments, folder / "raw"), AUTOENCODER)
    config = config_of(folder, folder, "encoded", context="precomputed")
    cpu = torch.device("cpu")
    ShardEncoder(config, folder / "raw", "raw", copy_text=False, device=cpu).run()
    return folder


def losses(config: Config, steps: int = STEPS) -> np.ndarray:
    trainer = small_trainer(config)
    batches = trainer.loader.batches(0)
    return np.array([float(trainer.step(batches, step)[0]) for step in range(steps)])


@pytest.mark.parametrize("implementation", ["plain", pytest.param("fast", marks=pytest.mark.slow)])
def test_losses_of_the_three_formats(shards, tmp_path, implementation):
    """In float32, where moments come from does not show; float16 of encoded shards shows a bit."""

    def run(format: str, context: str = "open_clip") -> np.ndarray:
        folder = tmp_path / f"{format}_{context}"
        changes = {"context": context, "implementation": implementation}
        return losses(config_of(shards, folder, format, **changes))

    moments = run("moments")
    np.testing.assert_allclose(run("raw"), moments, rtol=1e-5, atol=0)
    encoded = run("encoded", "precomputed")
    assert (encoded != moments).any()
    np.testing.assert_allclose(encoded, moments, rtol=2e-4, atol=0)


def test_dropped_captions_are_the_same_in_every_format(shards, tmp_path):
    """Encoded in the step, or read as states in whose place those of the empty caption stand."""

    def states(format: str, context: str) -> tuple[list[bool], torch.Tensor]:
        """Which captions are empty, and all text states."""
        changes = {"context": context, "drop_captions": 0.5}
        trainer = small_trainer(config_of(shards, tmp_path / format, format, **changes))
        batches = list(islice(trainer.loader.batches(0), 6))
        empty = [not caption for batch in batches for caption in batch.captions]
        return empty, torch.cat([trainer.step.context(batch).float() for batch in batches])

    empty, encoded_here = states("moments", "open_clip")
    assert empty == is_dropped(0, torch.arange(12), 0.5).tolist() and 0 < sum(empty) < 12
    also_empty, read = states("encoded", "precomputed")
    assert also_empty == empty
    torch.testing.assert_close(read, encoded_here, rtol=2**-10, atol=1e-4)


def test_the_range_of_pixels_matters(shards, tmp_path):
    """So that equal losses of two formats say that the same pixels were encoded."""
    benchmark, correct = (
        losses(config_of(shards, tmp_path / image_range, "raw", image_range=image_range), steps=1)
        for image_range in ("benchmark", "correct")
    )
    assert abs(benchmark - correct) > 1e-3


def test_photographs_of_another_autoencoder(real_data, tmp_path):
    """JPEG files of many sizes, encoded into Stable Diffusion's own latent space."""
    lines = (real_data / "coco_ccby" / "captions.jsonl").read_text().splitlines()[:6]
    with ShardWriter(tmp_path / "raw") as writer:
        for entry in map(json.loads, lines):
            picture = (real_data / "coco_ccby" / "images" / entry["file"]).read_bytes()
            writer.write_files({"jpg": picture, "txt": entry["captions"][0].encode()})
    encoder = real_data / "vaelight" / "VAEencoder.onnx"
    changes = {"autoencoder": str(encoder), "latent_size": 16}
    moments = config_of(tmp_path, tmp_path / "a", "moments", **changes)
    prepare_shards(moments, survey_images(moments, tmp_path / "raw"), encoder)
    raw = config_of(tmp_path, tmp_path / "b", "raw", **changes)
    np.testing.assert_allclose(losses(raw, steps=6), losses(moments, steps=6), rtol=1e-5, atol=0)


def test_a_run_goes_on_in_another_format(shards, tmp_path):
    """Where the user says so: same keys, same order, so the same samples follow."""
    run = tmp_path / "run"
    trainer = small_trainer(config_of(shards, run, "raw"))
    batches = trainer.loader.batches(0)
    for step in range(2):
        trainer.loss, _ = trainer.step(batches, step)
    trainer.samples = 4
    trainer.save()
    trainer.store.wait()
    with pytest.raises(ConfigError, match=r"data\.format: .* set data\.resume_in_another_format"):
        small_trainer(config_of(shards, run, "encoded"), resume=True)
    options = {"context": "precomputed", "resume_in_another_format": True}
    went_on = small_trainer(config_of(shards, run, "encoded", **options), resume=True)
    assert went_on.samples == 4
    captions = [next(went_on.loader.batches(4)).captions, next(batches).captions]
    assert captions[0] == captions[1]


def test_other_samples_are_no_other_format(shards, tmp_path):
    write_scene_shards(tmp_path / "other" / "raw", PICTURES + 1, seed=0)
    trainer = small_trainer(config_of(shards, tmp_path / "run", "moments"))
    trainer.save()
    trainer.store.wait()
    config = config_of(tmp_path / "other", tmp_path / "run", "raw", resume_in_another_format=True)
    with pytest.raises(CheckpointError, match=r"on other data \({'samples': 12, 'keys'"):
        small_trainer(config, resume=True)
