"""`data.image_range` in `data prepare`, from pictures to a step of training."""

from __future__ import annotations

import numpy as np
import pytest

from sd_perf.data.images import load_image
from sd_perf.data.prepare.scenes import write_scenes
from sd_perf.data.shards import ShardIndex
from sd_perf.models.readers import read_encoder
from tests.cli.bad_input import AUTOENCODER, TEXT_TINY, matches


@pytest.mark.parametrize(
    ("option", "scale", "shift"),
    [
        ([], 2, -1),
        (["--data.image-range", "correct"], 2, -1),
        (["--data.image-range", "benchmark"], 1, 0),
    ],
    ids=["default", "correct", "benchmark"],
)
def test_moments_that_training_reads(option, scale, shift, preset, shards, run, tmp_path, sd_perf):
    """The encoder gets pixels of the range, and training takes the shards."""
    pictures = tmp_path / "pictures"
    write_scenes(pictures, 4, seed=0)
    text = ("--text-encoder.model", TEXT_TINY, "--text-encoder.weights", "random")
    data = ("--data.format", "moments", "--data.path", shards, *text, "--model.context-dim", 128)
    command = ("--config", preset, *data)
    prepare = ("data", "prepare", *command, "--images", pictures, "--autoencoder", AUTOENCODER)
    assert sd_perf(*prepare, *option)[0] == 0

    image = load_image(pictures / "000002.png", 64)[None]
    expected = read_encoder(AUTOENCODER)(image * scale + shift).numpy()
    row = ShardIndex.open(shards).samples[2]
    size, offset = int(row["moments_size"]), int(row["moments_offset"])
    stored = (shards / "00000.tar").read_bytes()[offset : offset + size]
    moments = np.frombuffer(stored[-expected.nbytes :], np.float32).reshape(expected.shape)
    np.testing.assert_allclose(moments, expected, rtol=1e-4, atol=1e-4)
    code, output, _ = sd_perf("train", *command, "--run.dir", run)
    assert code == 0 and "starting at sample 0 of 8" in output


def test_other_ranges(preset, tmp_path, sd_perf):
    command = ("data", "prepare", "--config", preset, "--images", tmp_path)
    code, output, errors = sd_perf(*command, "--autoencoder", "a", "--data.image-range", "0_255")
    assert code == 2 and "Traceback" not in errors
    matches(output + errors, "image-range", "benchmark", "correct")
