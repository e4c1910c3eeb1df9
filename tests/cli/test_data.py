"""Bad numbers and places for the commands that make data, and Ctrl-C in what does not save."""

from __future__ import annotations

from pathlib import Path

import pytest

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
def test_ctrl_c_is_one_line(command, work, sd_perf, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(work, interrupted)
    code, _, errors = sd_perf(*command)
    assert (code, errors) == (130, "sd-perf: stopped by Ctrl-C\n")
