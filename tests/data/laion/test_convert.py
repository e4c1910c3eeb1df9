"""Raw shards to moments: the same as picture by picture, stopping and going on, bad input."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from sd_perf.data.digests import compare_digests
from sd_perf.data.images import load_picture
from sd_perf.data.laion import convert as module
from sd_perf.data.laion.convert import Result, convert
from sd_perf.data.shard_writer import add_sample, start_shard
from sd_perf.data.shards import ShardIndex
from sd_perf.errors import DataError
from sd_perf.models.readers import read_encoder
from tests.waiting import wait_for

Image = pytest.importorskip("PIL.Image", reason="needs Pillow")
AUTOENCODER = Path(__file__).parents[3] / "assets" / "tiny" / "autoencoder.safetensors"
SHARDS = ("00000.tar", "00007.tar")


def jpeg(seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    picture = Image.fromarray(rng.integers(0, 256, (5, 4 + seed % 3, 3)).astype(np.uint8))
    stream = io.BytesIO()
    picture.resize((80 + 7 * seed, 70)).save(stream, "JPEG")
    return stream.getvalue()


def write_shard(path: Path, changes: dict[int, dict[str, bytes | None]] | None = None) -> None:
    """Five samples as img2dataset writes them: keys of nine digits, not sorted. `changes` replaces
    or removes files of samples by their number."""
    path.parent.mkdir(exist_ok=True)
    with start_shard(path) as tar:
        for number in (3, 0, 4, 2, 1):
            files = {
                "jpg": jpeg(number),
                "txt": b"" if number == 2 else f"picture {number}".encode(),
                "json": json.dumps({"LICENSE": "cc-by", "exif": None}).encode(),
                **(changes or {}).get(number, {}),
            }
            held = {name: content for name, content in files.items() if content is not None}
            add_sample(tar, f"{path.stem}{number:04d}", held)


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar if member.isreg()}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    for name in SHARDS:
        write_shard(tmp_path / "raw" / name)
    return tmp_path / "raw"


def run(raw: Path, out: Path, **options) -> Result:
    fixed = {"pixels": 64, "image_range": "benchmark", "devices": ["cpu"]}
    return convert(raw, out, AUTOENCODER, **{**fixed, "batch_size": 3, "threads": 2, **options})


@pytest.mark.parametrize("image_range", ["benchmark", "correct"])
def test_moments_are_those_of_single_pictures(raw, tmp_path, image_range):
    assert run(raw, tmp_path / "out", image_range=image_range) == Result(2, 10, 0, [])
    encoder = read_encoder(AUTOENCODER)
    for name in SHARDS:
        before, after = members(raw / name), members(tmp_path / "out" / name)
        assert list(after) == sorted(key.replace(".jpg", ".npy") for key in before)
        for key, content in before.items():
            if not key.endswith(".jpg"):
                assert after[key] == content
                continue
            moments = np.load(io.BytesIO(after[key.replace(".jpg", ".npy")]))
            expected = encoder(load_picture(content, 64, image_range)[None]).numpy()
            assert moments.dtype == np.float32 and moments.shape == (1, 8, 8, 8)
            np.testing.assert_allclose(moments, expected, rtol=1e-5, atol=1e-5)
    assert len(ShardIndex.open(tmp_path / "out")) == 10
    shards = [tmp_path / "out" / name for name in SHARDS]
    assert list(compare_digests(tmp_path / "out", shards)) == []


def test_a_stopped_conversion_goes_on(raw, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    run(raw, whole)

    def stop(done: int, of: int) -> None:
        assert of == 2
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(raw, out, progress=stop)
    assert [path.name for path in out.glob("*.tar")] == ["00000.tar"]
    before = (out / "00000.tar").stat().st_mtime_ns
    assert run(raw, out) == Result(2, 10, 0, [])
    assert (out / "00000.tar").stat().st_mtime_ns == before
    for name in (*SHARDS, "SHA256SUMS"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()


def test_a_shard_that_was_fetched_again_is_converted_again(raw, tmp_path):
    run(raw, tmp_path / "out")
    write_shard(raw / "00007.tar", {0: {"txt": b"other words"}})
    run(raw, tmp_path / "out")
    assert members(tmp_path / "out" / "00007.tar")["000070000.txt"] == b"other words"


def test_damaged_pictures_are_left_out_and_listed(raw, tmp_path):
    changes = {
        0: {"jpg": jpeg(0)[:300]},
        1: {"jpg": None, "png": b""},
        2: {"txt": None},
        3: {"txt": b"\xff\xfe"},
    }
    write_shard(raw / "00007.tar", changes)
    assert run(raw, tmp_path / "out") == Result(2, 6, 4, [])
    listed = (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()
    faults = [json.loads(line) for line in listed]
    assert [(fault["shard"], fault["key"]) for fault in faults] == [
        ("00007.tar", f"00007000{number}") for number in range(4)
    ]
    words = ("cannot be decoded", "cannot be decoded", "needs a picture", "not UTF-8")
    assert all(word in fault["error"] for word, fault in zip(words, faults, strict=True))
    assert {name[:9] for name in members(tmp_path / "out" / "00007.tar")} == {"000070004"}


def test_huge_pictures_are_not_decoded(raw, tmp_path):
    stream = io.BytesIO()
    Image.new("1", (10_000, 9_000)).save(stream, "PNG")
    write_shard(raw / "00007.tar", {0: {"jpg": None, "png": stream.getvalue()}})
    assert run(raw, tmp_path / "out").left_out == 1
    assert "10000 x 9000 pixels, more than" in (tmp_path / "out" / "left_out.jsonl").read_text()
    assert run(raw, tmp_path / "small", max_pixels=7000).left_out == 5


@pytest.mark.parametrize("what", ["cut", "link", "climbs"])
def test_shards_that_cannot_be_read_are_named_and_the_others_converted(raw, tmp_path, what):
    bad = raw / "00000.tar"
    if what == "cut":
        bad.write_bytes(bad.read_bytes()[:3000])
    else:
        with start_shard(bad) as tar:
            info = tarfile.TarInfo("../../outside.txt" if what == "climbs" else "000000000.jpg")
            if what == "link":
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(info)
    result = run(raw, tmp_path / "out")
    assert (result.shards, result.samples, len(result.faults)) == (1, 5, 1)
    assert "00000.tar" in result.faults[0]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == ["00007.tar"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw"]


def test_shards_of_one_set_are_made_alike(raw, tmp_path):
    run(raw, tmp_path / "out")
    with pytest.raises(DataError, match="begun with another image_range"):
        run(raw, tmp_path / "out", image_range="correct")
    with pytest.raises(DataError, match="begun with another pixels"):
        run(raw, tmp_path / "out", pixels=32)


def test_shards_of_others_are_not_overwritten(raw, tmp_path):
    write_shard(tmp_path / "out" / "00000.tar")
    before = (tmp_path / "out" / "00000.tar").read_bytes()
    with pytest.raises(DataError, match="no record of its conversion"):
        run(raw, tmp_path / "out")
    assert (tmp_path / "out" / "00000.tar").read_bytes() == before
    with pytest.raises(DataError, match="is the folder that is read"):
        run(raw, raw)
    with pytest.raises(DataError, match=r"holds no \*\.tar files"):
        run(tmp_path / "absent", tmp_path / "out")


@pytest.mark.parametrize("output", ["shape", "nan"])
def test_an_encoder_that_cannot_be_used(raw, tmp_path, monkeypatch, output):
    def encoder(images: torch.Tensor) -> torch.Tensor:
        return torch.full((len(images), 8 if output == "nan" else 4, 8, 8), float("nan"))

    monkeypatch.setattr(module, "_read_encoder", lambda path, device: encoder)
    with pytest.raises(DataError, match=r"samples 000000000 to 000000002: the encoder gives"):
        run(raw, tmp_path / "out")
    assert list((tmp_path / "out").glob("*.tar")) == []


def test_a_full_disk(raw, mount_tmpfs):
    out = mount_tmpfs("size=24k") / "out"
    with pytest.raises(DataError, match=r"00000\.tar cannot be written \(No space left"):
        run(raw, out)
    assert not [path for path in out.iterdir() if path.name != "conversion"]


@pytest.mark.slow
def test_kill_and_go_on(raw, tmp_path):
    """kill -9 while shards are written: those that are there are whole, and the rest follows."""
    for number in range(10, 40):
        write_shard(raw / f"{number:05}.tar")
    run(raw, tmp_path / "whole")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*.tar")}
    out = tmp_path / "out"
    call = f"""
import time
from pathlib import Path
from sd_perf.data.laion.convert import convert
options = dict(pixels=64, image_range="benchmark", devices=["cpu"], batch_size=3)
options["progress"] = lambda done, of: time.sleep(done >= 5)  # so that it is killed before its end
convert(Path({str(raw)!r}), Path({str(out)!r}), Path({str(AUTOENCODER)!r}), **options)
"""
    process = subprocess.Popen([sys.executable, "-c", call])
    wait_for(lambda: len(list(out.glob("*.tar"))) >= 5 or process.poll() is not None, poll=0.01)
    process.kill()
    process.wait()
    written = {path.name: path.read_bytes() for path in out.glob("*.tar")}
    assert 5 <= len(written) < 32 and written.items() <= whole.items()
    assert run(raw, out).shards == 32
    assert {path.name: path.read_bytes() for path in out.glob("*.tar")} == whole


@pytest.mark.slow
def test_two_processes_give_the_same_bytes(raw, tmp_path):
    run(raw, tmp_path / "one")
    steps = []
    options = {"devices": ["cpu", "cpu"], "progress": lambda done, of: steps.append(done)}
    assert run(raw, tmp_path / "two", **options) == Result(2, 10, 0, [])
    assert steps[-1] == 2
    for name in SHARDS:
        assert members(tmp_path / "one" / name) == members(tmp_path / "two" / name)
