"""Shards and samples that cannot be used: one sentence with shard and key, exit code 2."""

from __future__ import annotations

import os
import shutil

import numpy as np
import pytest

from sd_perf.data.order import SampleOrder
from sd_perf.data.prepare.scenes import write_scenes
from tests.cli.bad_input import (
    AUTOENCODER,
    CONTEXT,
    MOMENTS,
    TEXT_TINY,
    cut,
    data_options,
    matches,
    newest,
    sample_files,
    saved,
    write_shards,
    write_tar,
)
from tests.data.test_samples import Bomb, npy


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (shutil.rmtree, ["shards is not a folder", "data.path must name"]),
        (
            lambda shards: (shards / "00000.tar").unlink(),
            ["shards is empty", "data.path must name"],
        ),
        (
            lambda shards: (shards / "00000.tar").rename(shards / "00000.zip"),
            ["shards holds no *.tar", "data.path"],
        ),
        (
            lambda shards: cut(shards / "00000.tar"),
            ["00000.tar cannot be read as a tar file (unexpected end", "again"],
        ),
        (
            lambda shards: os.truncate(shards / "00000.tar", 512),
            ["00000.tar cannot be read", "again"],
        ),
        (
            lambda shards: (shards / "00000.tar").write_bytes(b"junk"),
            ["00000.tar cannot be read as a tar", "again"],
        ),
        *[
            (
                lambda shards, e=e: write_tar(shards / "00000.tar", sample_files(**{e: None})),
                ["000000003", what, do],
            )
            for e, what, do in [
                ("npy", ".npy", "needs"),
                ("txt", ".txt", "needs"),
                ("context.npy", "no text states", "set data.context to open_clip"),
            ]
        ],
    ],
    ids=[
        "no folder",
        "empty",
        "no tar",
        "cut",
        "cut in a header",
        "junk",
        "no npy",
        "no txt",
        "no context",
    ],
)
def test_shards(spoil, parts, preset, run, shards, refused):
    """Told before the run folder is made."""
    shards.mkdir()
    write_tar(shards / "00000.tar", sample_files())
    spoil(shards)
    matches(refused("train", "--config", preset, "--run.dir", run, *data_options(shards)), *parts)
    assert not run.exists()


def with_value(value: float) -> np.ndarray:
    moments = MOMENTS.copy()
    moments[0, 5, 3, 3] = value
    return moments


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"npy": npy(MOMENTS[:, :4])}, "moments has shape (1, 4, 8, 8), not (1, 8, 8, 8)"),
        ({"npy": npy(MOMENTS.astype(np.float16))}, "moments has dtype float16, not float32"),
        (
            {"npy": npy(np.array([Bomb()], dtype=object), allow_pickle=True)},
            "moments holds pickled objects, which are",
        ),
        ({"npy": npy(with_value(np.nan))}, "moments has values that are NaN or infinite"),
        ({"npy": npy(with_value(np.inf))}, "moments has values that are NaN or infinite"),
        ({"context.npy": npy(CONTEXT[:2])}, "context has shape (2, 16), not (3, 16)"),
        ({"txt": b""}, "caption is empty"),
        ({"txt": b"caf\xe9"}, "caption is not UTF-8"),
        ({"txt": 10240 * b"x"}, "caption has 10240 bytes, more than 4096"),
    ],
)
def test_samples(bad, reason, preset, run, shards, refused):
    shards.mkdir()
    write_tar(shards / "00000.tar", sample_files(**bad))
    sentence = refused("train", "--config", preset, "--run.dir", run, *data_options(shards))
    matches(
        sentence,
        f"{shards}: sample 000000003 in 00000.tar: {reason}",
        "mend it, or set data.max_bad_samples",
    )
    assert not (run / "checkpoints").exists()


def test_more_bad_samples_than_allowed(preset, run, shards, refused, sd_perf):
    order = SampleOrder(seed=0, num_samples=16)
    write_shards(shards, {order.sample(position) for position in (1, 5, 6)})
    command = [
        "train",
        "--config",
        preset,
        "--run.dir",
        run,
        *data_options(shards),
        "--data.max-bad-samples",
    ]
    sentence = refused(*command, 1)
    matches(
        sentence,
        "3 bad samples, more than data.max_bad_samples (1), the last 0000000",
        "NaN",
        "raise the limit",
    )
    assert (run / "bad_samples.jsonl").read_text().count("\n") == 3
    assert newest(run).name == "samples_0000000004"
    assert sd_perf(*command, 3, "--resume")[0] == 0
    before = saved(run)
    longer = ["--resume", "--training.max-samples", 12]
    matches(
        refused(*command, 1, *longer), "3 bad samples, more than data.max_bad_samples (1); mend"
    )
    assert saved(run / "checkpoints") == {
        k.removeprefix("checkpoints/"): v for k, v in before.items() if "check" in k
    }


def test_text_encoder_weights(preset, run, shards, refused, tmp_path):
    write_shards(shards)
    options = [
        *data_options(shards)[:-1],
        "open_clip",
        "--text-encoder.model",
        TEXT_TINY,
        "--text-encoder.weights",
    ]
    command = ["train", "--config", preset, "--run.dir", run, *options]
    matches(
        refused(*command, tmp_path / "absent.bin"),
        "absent.bin: no such file",
        "text_encoder.weights names",
    )
    matches(refused(*command, ""), "text_encoder.weights: ''", "a file of weights")
    matches(
        refused(*command, "random"),
        "model.context_dim: 16 cannot be used",
        "it must be 128, the width of",
    )
    assert not run.exists()


def test_shards_are_written_to_a_named_folder(
    preset, shards, refused, sd_perf, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    write_scenes(tmp_path / "scenes", 4, seed=0)
    command = [
        "data",
        "prepare",
        "--config",
        preset,
        "--images",
        tmp_path / "scenes",
        "--autoencoder",
        AUTOENCODER,
    ]
    matches(refused(*command), "data.path: ''", "the folder to write the shards to")
    command += ["--data.path", shards]
    assert sd_perf(*command)[0] == 0
    before = saved(shards)
    matches(refused(*command), "00000.tar exists already", "write to another folder")
    assert saved(shards) == before
