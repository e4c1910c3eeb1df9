"""Bad numbers and places for the commands that make data, and signals in what does not save."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from PIL import Image

from sd_perf.data.prepare.scenes import write_scenes
from sd_perf.stopping import STOP_SIGNALS
from tests.cli.bad_input import AUTOENCODER, matches

SMOKE = Path(__file__).parents[2] / "configs" / "smoke.yaml"


@pytest.mark.parametrize("shards", [[], ["--shards"]], ids=["pictures", "shards"])
def test_scenes(shards, tmp_path, refused):
    command = ["data", "scenes", *shards, "--output"]
    for samples in (0, -3):
        sentence = refused(*command, tmp_path / "new", "--samples", samples)
        assert sentence == f"sd-perf: --samples: {samples} cannot be used; it must be at least 1"
    matches(
        refused(*command, tmp_path / "new", "--uncaptioned-every", -1),
        "--uncaptioned-every: -1",
        "0 or more",
    )
    assert not (tmp_path / "new").exists()
    matches(
        refused(*command, "/proc/x/y"), "/proc/x/y cannot be written (", "choose another folder"
    )


def test_numbers_of_prepared_samples(tmp_path, refused):
    command = [
        "data",
        "prepare",
        "--config",
        SMOKE,
        "--images",
        tmp_path,
        "--autoencoder",
        AUTOENCODER,
    ]
    matches(
        refused(*command, "--captions-per-image", 0),
        "--captions-per-image: 0 cannot be used",
        "at least 1",
    )
    matches(
        refused(*command, "--samples-per-shard", 0),
        "--samples-per-shard: 0 cannot be used",
        "1 to 10000",
    )


def test_a_folder_is_counted_and_then_prepared(tmp_path, sd_perf, refused):
    """The dry run writes nothing and says what the run does; a picture too small is named."""
    images, shards = tmp_path / "my scenes", tmp_path / "shards"
    write_scenes(images, 3, seed=0)
    (images / "copy.png").write_bytes((images / "000001.png").read_bytes())
    (images / "none.png").touch()
    Image.new("RGB", (40, 40)).save(images / "small.png")
    with (images / "captions.jsonl").open("a") as file:
        for name in ("copy", "small"):
            file.write(f'{{"file": "{name}.png", "caption": "x"}}\n')
    command = ("data", "prepare", "--config", SMOKE, "--images", images, "--data.path", shards)
    code, output, _ = sd_perf(*command, "--dry-run")
    matches(output, "5 pictures with 5 captions", "1 without a caption", "1 duplicate")
    matches(output, "1 too small", "small.png has 40x40 pixels", "--small enlarge", "would refuse")
    assert code == 1 and not shards.exists()
    matches(refused(*command), "--autoencoder names no file", "--dry-run")
    command = (*command, "--autoencoder", AUTOENCODER)
    matches(refused(*command, "--background", "no"), "--background: 'no' is no colour")
    code, output, _ = sd_perf(*command, "--small", "enlarge", "--data.workers", 1)
    matches(output, "4 samples of 64x64 pixels", "1 duplicate", shards / "contact_sheet.html")
    assert code == 0 and (shards / "contact_sheet.html").read_text().count("<img") == 4
    assert "copy.png" in (shards / "bad_images.jsonl").read_text()


@pytest.mark.parametrize(
    ("command", "work"),
    [
        (["data", "scenes", "--output", "x"], "sd_perf.data.prepare.scenes.write_scenes"),
        (["evaluate", "x"], "sd_perf.runs.folder.read_run_config"),
    ],
    ids=["data scenes", "evaluate"],
)
@pytest.mark.parametrize(
    ("number", "code", "name"),
    [
        (signal.SIGINT, 130, "Ctrl-C"),
        (signal.SIGTERM, 75, "SIGTERM"),
        (signal.SIGUSR1, 75, "SIGUSR1"),
        (signal.SIGHUP, 75, "SIGHUP"),
    ],
)
def test_a_signal_is_one_line(command, work, number, code, name, sd_perf, monkeypatch):
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    monkeypatch.setattr(work, lambda *_: signal.raise_signal(number))
    left, _, errors = sd_perf(*command)
    assert (left, errors) == (code, f"sd-perf: stopped by {name}\n")
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
