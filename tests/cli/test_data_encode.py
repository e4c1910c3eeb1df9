"""`data encode` from the command line, and training on what it writes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sd_perf.data.prepare.scenes import write_scene_shards
from sd_perf.data.shards import ShardIndex
from tests.cli.bad_input import AUTOENCODER, TEXT_TINY, data_options, matches, write_shards
from tests.small_run import torchrun
from tests.waiting import wait_for


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    write_scene_shards(tmp_path / "raw", 8, seed=0)
    return tmp_path / "raw"


@pytest.fixture
def options(preset, shards) -> list[object]:
    """Of a run on encoded shards with text states of the tiny tower."""
    data = ["--data.format", "encoded", "--data.path", shards, "--data.context", "precomputed"]
    text = ["--text-encoder.model", TEXT_TINY, "--text-encoder.weights", "random"]
    sizes = ["--model.context-dim", 128, "--data.context-tokens", 24]
    return ["--config", preset, *data, *text, *sizes, "--data.autoencoder", AUTOENCODER]


def test_from_pictures_to_training(raw, options, run, shards, sd_perf):
    encode = ("data", "encode", *options, "--source", raw, "--source-format", "raw")
    code, output, _ = sd_perf(*encode)
    assert code == 0
    matches(output, f"8 samples, 0 of them bad -> {shards}", "moments 2.", "of their root mean")
    written = (shards / "00000.safetensors").stat().st_mtime_ns
    assert sd_perf(*encode)[0] == 0  # nothing to do
    assert (shards / "00000.safetensors").stat().st_mtime_ns == written
    assert sd_perf("data", "verify", *options)[0] == 0
    assert sd_perf("train", *options, "--run.dir", run)[0] == 0


def test_what_cannot_be(raw, options, shards, refused, tmp_path):
    encode = ["data", "encode", *options, "--source", raw, "--source-format"]
    matches(
        refused(*encode, "raw", "--data.format", "moments"), "data.format: 'moments'", "encoded"
    )
    matches(refused(*encode, "raw", "--text", "copy"), "raw shards hold no text states", "--text")
    matches(refused(*encode, "moments"), "read with data.format raw")
    matches(refused(*encode, "raw", "--batch-size", 0), "--batch-size: 0", "at least 1")
    matches(refused(*encode, "raw", "--data.autoencoder", tmp_path / "no.ckpt"), "no.ckpt")
    sizes = ["--data.context-tokens", 23]
    matches(refused(*encode, "raw", *sizes), "data.context_tokens: 23", "it must be 24, the tokens")
    assert not list(shards.glob("*.safetensors"))


def test_raw_shards_need_an_encoder_and_captions(preset, raw, refused, run):
    command = ["train", "--config", preset, "--run.dir", run, "--data.path", raw]
    command += ["--data.format", "raw", "--text-encoder.weights", "random"]
    matches(refused(*command), "data.autoencoder: ''", "the file of the encoder")
    command += ["--data.autoencoder", AUTOENCODER]
    matches(refused(*command, "--data.context", "precomputed"), "data.context", "`data encode`")
    sizes = ["--model.in-channels", 8, "--model.out-channels", 8, "--model.context-dim", 128]
    matches(
        refused(*command, *sizes, "--text-encoder.model", TEXT_TINY),
        "model.in_channels: 8 cannot be used; it must be 4, the channels of",
    )
    assert not run.exists()


def test_verify_decodes_every_picture(preset, raw, sd_perf):
    command = ["data", "verify", "--config", preset, "--data.format", "raw", "--data.path", raw]
    command += ["--data.autoencoder", AUTOENCODER, "--text-encoder.weights", "random"]
    assert sd_perf(*command)[0] == 0
    shard = (raw / "00000.tar").read_bytes()
    first = shard.index(b"IDAT") + 20
    (raw / "00000.tar").write_bytes(shard[:first] + bytes(40) + shard[first + 40 :])
    code, output, _ = sd_perf(*command)
    assert code == 1
    matches(output, "sample 000000000 in 00000.tar: the image cannot be decoded", "bytes are not")


def test_dali_is_for_pictures(preset, shards, refused):
    write_shards(shards)
    sentence = refused("train", "--config", preset, *data_options(shards), "--data.loader", "dali")
    matches(sentence, "data.loader: 'dali'", "portable, since data.format is 'moments'")


@pytest.mark.slow
def test_processes_share_the_shards(raw, options, shards, tmp_path):
    for number in range(1, 4):
        shutil.copy(raw / "00000.tar", raw / f"{number:05d}.tar")
    command = [*torchrun(2, tmp_path), "-m", "sd_perf", "data", "encode", *options]
    command += ["--source", raw, "--source-format", "raw", "--data.index", tmp_path / "index.npz"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "process 1 of 2: 16 samples, 0 of them bad" in done.stdout
    assert len(ShardIndex.open(shards, format="encoded")) == 32


@pytest.mark.slow
def test_it_goes_on_after_kill_9(raw, options, shards, tmp_path, sd_perf):
    for number in range(1, 6):
        shutil.copy(raw / "00000.tar", raw / f"{number:05d}.tar")
    arguments = ["data", "encode", *options, "--source", raw, "--source-format", "raw"]
    command = [sys.executable, "-m", "sd_perf", *map(str, arguments)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    wait_for(lambda: any(shards.glob("*.safetensors")) or process.poll() is not None, poll=0.01)
    process.kill()
    process.wait()
    before = {path.name: path.read_bytes() for path in shards.glob("*.safetensors")}
    assert before
    assert sd_perf(*arguments)[0] == 0
    assert len(ShardIndex.open(shards, format="encoded")) == 48
    for name, content in before.items():
        assert (shards / name).read_bytes() == content
