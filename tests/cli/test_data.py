"""Bad numbers and places for the commands that make data, and signals in what does not save."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

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
