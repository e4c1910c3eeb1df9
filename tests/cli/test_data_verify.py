"""`sd-perf data verify`: every sample is read, and bytes are compared with SHA256SUMS."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import types

import pytest
from PIL import Image

from tests.cli.bad_input import cut, data_options, matches, write_shards


@pytest.fixture
def verify(preset, shards, sd_perf):
    """verify(...) -> exit code and lines of `data verify` on `shards`, but for its table."""

    def call(*options: object) -> tuple[int, list[str]]:
        command = ("data", "verify", "--config", preset, *data_options(shards))
        code, output, errors = sd_perf(*command, *options)
        assert not errors
        return code, [line for line in output.splitlines() if line[0] not in "┏┃┡│├└"]

    return call


def test_good_shards(verify, shards):
    write_shards(shards)
    assert verify() == (0, [])
    assert sorted(path.name for path in shards.iterdir()) == ["00000.tar", "SHA256SUMS"]
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=shards, capture_output=True)
    assert checked.stdout == b"00000.tar: OK\n"


def test_every_bad_sample_is_named(verify, shards):
    write_shards(shards, bad={3, 5})
    code, lines = verify("--data.max-bad-samples", 9)
    assert code == 1 and len(lines) == 2
    matches(lines[0], f"{shards}: sample 000000003 in 00000.tar: moments has values that are NaN")
    code, lines = verify("--record")
    assert code == 1 and "digests" not in lines[-1]


def test_bytes_that_were_changed_in_place(verify, shards):
    """Values of the same size, at the same time: what neither training nor --resume sees."""
    write_shards(shards)
    path = shards / "00000.tar"
    times = path.stat()
    data = bytearray(path.read_bytes())
    place = data.index(b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'") + 128
    data[place + 1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    code, [line] = verify()
    assert code == 1
    matches(line, path, "its bytes are not those recorded")
    code, lines = verify("--record")
    assert code == 0 and lines[-1] == f"digests of 1 files -> {shards}/SHA256SUMS"
    assert verify()[0] == 0


def test_shards_that_came_and_went(verify, shards):
    write_shards(shards)
    shutil.copy(shards / "00000.tar", shards / "00001.tar")
    (shards / "00000.tar").rename(shards / "00002.tar")
    code, lines = verify()
    assert code == 1 and len(lines) == 3
    matches(lines[0], "00001.tar: is not in SHA256SUMS")
    matches(lines[2], "00000.tar: is missing")


def test_shards_that_cannot_be_read(verify, shards):
    """Each is named, and those behind it are read."""
    write_shards(shards)
    (shards / "SHA256SUMS").unlink()
    shutil.copy(shards / "00000.tar", shards / "00003.tar")
    cut(shards / "00000.tar")
    os.mkfifo(shards / "00001.tar")
    (shards / "00002.tar").symlink_to("nowhere")
    code, lines = verify()
    assert code == 1
    for line, part in zip(lines, ("unexpected end of data", "FIFO", "No such file"), strict=True):
        matches(line, part)


@pytest.mark.parametrize("content", [b"x", b"0" * 64 + b"  /etc/passwd\n", b"\xff\0\n" * 9])
def test_hostile_sums(content, preset, shards, refused):
    write_shards(shards)
    (shards / "SHA256SUMS").write_bytes(content)
    command = ("data", "verify", "--config", preset, *data_options(shards))
    matches(refused(*command), "SHA256SUMS: line 1 holds no SHA-256", "--record")
    (shards / "SHA256SUMS").unlink()
    os.mkfifo(shards / "SHA256SUMS")
    matches(refused(*command), "SHA256SUMS: cannot be read (it is a FIFO)")


def test_no_shards(preset, refused, tmp_path):
    command = ("data", "verify", "--config", preset)
    matches(refused(*command), "data verify needs a folder, or a preset (--config) with data.path")
    matches(refused("data", "verify"), "data verify needs a folder")
    matches(refused(*command, "--data.path", tmp_path / "no"), "is not a folder")
    (tmp_path / "empty").mkdir()
    matches(refused("data", "verify", tmp_path / "empty"), "has no captions.jsonl in it")
    raw = ("--data.format", "raw", "--data.autoencoder", "a", "--text-encoder.weights", "a")
    sentence = refused(*command, "--data.path", tmp_path / "empty", *raw)
    matches(sentence, "is empty", "*.tar raw shards")


def test_pictures(verify, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in "ab":
        Image.new("RGB", (80, 70), "red").save(folder / f"{name}.png")
    lines = [f'{{"file": "{name}.png", "caption": "a picture"}}\n' for name in "ab"]
    (folder / "captions.jsonl").write_text("".join(lines))
    assert verify("--images", folder) == (0, [])
    recorded = [f"digests of 3 files -> {folder}/SHA256SUMS"]
    assert verify("--images", folder, "--record") == (0, recorded)
    (folder / "captions.jsonl").write_text("".join(lines).replace("picture", "cat"))
    cut(folder / "b.png")
    code, lines = verify("--images", folder)
    assert code == 1
    matches(lines[0], "captions.jsonl line 2", "b.png cannot be decoded")
    matches(lines[1], "b.png: its bytes are not those recorded")
    matches(lines[2], "captions.jsonl: its bytes are not those recorded")


def test_raw_shards(verify, tmp_path, sd_perf):
    folder = tmp_path / "scenes"
    assert sd_perf("data", "scenes", "--output", folder, "--samples", 3, "--shards")[0] == 0
    assert verify("--images", folder) == (0, [])
    data = bytearray((folder / "00000.tar").read_bytes())
    data[data.index(b"IDAT") + 40] ^= 8
    (folder / "00000.tar").write_bytes(data)
    code, lines = verify("--images", folder)
    assert code == 1 and "its bytes are not those recorded" in lines[-1]


def test_a_folder_without_a_preset(sd_perf, shards, tmp_path):
    """What it holds is found by looking; the verdict is also JSON."""
    write_shards(shards)
    assert (
        sd_perf("data", "scenes", "--output", tmp_path / "raw", "--samples", 3, "--shards")[0] == 0
    )
    for folder, samples in ((shards, 16), (tmp_path / "raw", 3)):
        code, output, _ = sd_perf("data", "verify", folder, "--json")
        verdict = json.loads(output)
        assert code == 0 and verdict["samples"] == samples and verdict["faults"] == []
        assert verdict["parts"][0]["path"] == f"{folder}/00000.tar"
    write_shards(tmp_path / "bad", bad={3})
    code, output, _ = sd_perf("data", "verify", tmp_path / "bad")
    assert code == 1 and "sample 000000003 in 00000.tar: moments has values" in output
    row = output.splitlines()[-2]
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["all 1", "16", "0", "1"]


def test_empty_captions_are_counted(sd_perf, tmp_path):
    options = ("--samples", 6, "--shards", "--uncaptioned-every", 3)
    assert sd_perf("data", "scenes", "--output", tmp_path / "raw", *options)[0] == 0
    code, output, _ = sd_perf("data", "verify", tmp_path / "raw", "--json")
    assert code == 0 and json.loads(output)["empty_captions"] == 2


@pytest.mark.parametrize(
    ("name", "record"),
    [("conversion/00000.json", {"samples": 15}), ("00000_stats.json", {"successes": 17})],
)
def test_samples_are_counted_against_what_their_maker_says(sd_perf, shards, name, record):
    write_shards(shards)
    (shards / name).parent.mkdir(exist_ok=True)
    (shards / name).write_text(json.dumps(record))
    code, output, _ = sd_perf("data", "verify", shards)
    assert code == 1
    matches(output, f"00000.tar: holds 16 samples, and {(shards / name).name} says 1")


def test_many_shards_are_read_by_processes(sd_perf, shards, monkeypatch):
    """As many verdicts as shards, in their order; the pool's own work is done here."""
    write_shards(shards)
    for number in range(1, 9):
        shutil.copy(shards / "00000.tar", shards / f"{number:05}.tar")
    (shards / "SHA256SUMS").unlink()
    pools = []

    @contextlib.contextmanager
    def pool(processes):
        pools.append(processes)
        yield types.SimpleNamespace(map=map)

    monkeypatch.setattr("sd_perf.data.verify.worker_pool", pool)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    code, output, _ = sd_perf("data", "verify", shards, "--json")
    paths = [part["path"] for part in json.loads(output)["parts"]]
    assert code == 0 and pools == [2]
    assert paths == sorted(paths) and len(paths) == 9
