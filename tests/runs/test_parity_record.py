"""A recipe with an MLPerf log starts with a green record of its config, this code and this device,
or says so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from sd_perf import cli
from sd_perf.config import Config
from sd_perf.errors import ConfigError
from sd_perf.files import read_json, write_json
from sd_perf.mlperf.log import LOG_NAME, read_log
from sd_perf.presets import config_from_dict, load_preset
from sd_perf.runs.parity_record import (
    DEFAULT_LEVELS,
    RECORD_NAME,
    closest_to_limit,
    identity,
    record_folder,
    require_green,
    rows_by_level,
    verdict,
)

TREE: dict[str, Any] = {
    "model": {
        "implementation": "fast",
        "model_channels": 32,
        "channel_mult": [1, 2],
        "num_res_blocks": 1,
        "attention_resolutions": [2],
        "num_head_channels": 32,
        "context_dim": 16,
    },
    "data": {"format": "synthetic", "latent_size": 8, "context_tokens": 3},
    "training": {
        "global_batch_size": 4,
        "max_samples": 8,
        "precision": "fp32",
        "device": "cpu",
        "seed": 0,
    },
    "mlperf": {"division": "open", "org": "sd-perf", "platform": "a CPU", "status": "research"},
}


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    path = tmp_path / "fast.yaml"
    path.write_text(yaml.safe_dump({**TREE, "run": {"dir": str(tmp_path / "run")}}))
    return path


@pytest.fixture
def config(preset: Path) -> Config:
    return load_preset(preset)


def green(of: Config, **changes: Any) -> dict[str, Any]:
    return {**identity(of), "ok": True, "levels": list(DEFAULT_LEVELS), "rows": [], **changes}


def test_a_green_record_is_taken(config: Config) -> None:
    folder = record_folder(config)
    assert folder.name == "run.parity"
    folder.mkdir()
    write_json(folder / RECORD_NAME, green(config))
    assert require_green(config)["ok"]
    elsewhere = dataclasses.replace(
        config, run=dataclasses.replace(config.run, dir=str(folder.parent / "other"))
    )
    with pytest.raises(
        ConfigError, match=r"other.parity/parity.json is not there; run `sd-perf parity`"
    ):
        require_green(elsewhere)
    named = dataclasses.replace(elsewhere.mlperf, parity_record=str(folder / RECORD_NAME))
    assert require_green(dataclasses.replace(elsewhere, mlperf=named))["ok"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ok": False}, "is red"),
        ({"ok": "yes"}, "is red"),
        ({"code": "0"}, "is of another code"),
        ({"config": "0"}, "is of another config"),
        ({"device": "a GPU"}, "is of another device"),
        ({"levels": ["op", "unet"]}, "lacks the level block"),
        ({"rows": None}, "is no parity record"),
    ],
)
def test_a_record_of_something_else_is_not(
    changes: dict[str, Any], words: str, config: Config
) -> None:
    record_folder(config).mkdir()
    write_json(record_folder(config) / RECORD_NAME, green(config, **changes))
    with pytest.raises(ConfigError, match=words):
        require_green(config)


@pytest.mark.parametrize(
    ("section", "changes", "same"),
    [
        ("model", {"num_res_blocks": 2}, False),
        ("kernels", {"geglu": "reference"}, False),
        ("optimizer", {"beta_2": 0.99}, False),
        ("training", {"max_samples": 80}, True),
        ("run", {"note": "another"}, True),
    ],
)
def test_the_record_is_of_what_computes_a_step(
    section: str, changes: dict[str, Any], same: bool
) -> None:
    tree = {**TREE, section: {**TREE.get(section, {}), **changes}}
    digests = [identity(config_from_dict(some))["config"] for some in (TREE, tree)]
    assert (digests[0] == digests[1]) == same


@pytest.fixture
def sd_perf(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(list(map(str, arguments)))
        told = capsys.readouterr()
        return int(left.value.code or 0), told.out, told.err

    return run


def test_a_recipe_needs_it_unless_it_is_waived_by_name(
    preset: Path, config: Config, sd_perf: Any
) -> None:
    run = Path(config.run.dir)
    code, _, errors = sd_perf("train", "--config", preset)
    assert (
        code == 2 and "needs a green parity record" in errors and "--mlperf.waive parity" in errors
    )
    assert not run.exists()
    code, output, _ = sd_perf("train", "--config", preset, "--mlperf.waive", "parity")
    assert code == 0 and "waived by name: parity" in output
    assert [event.value for event in read_log(run / LOG_NAME) if event.key == "sd_perf_waived"] == [
        "parity"
    ]
    assert not (run / RECORD_NAME).exists()


def test_a_run_keeps_its_record_and_its_kernels(preset: Path, config: Config, sd_perf: Any) -> None:
    record_folder(config).mkdir()
    write_json(record_folder(config) / RECORD_NAME, green(config))
    code, output, _ = sd_perf("train", "--config", preset)
    assert code == 0 and "kernels on cpu" in output
    run = Path(config.run.dir)
    assert read_json(run / RECORD_NAME)["ok"] is True
    assert not any(event.key == "sd_perf_waived" for event in read_log(run / LOG_NAME))
    kernels = {choice["op"]: choice["backend"] for choice in read_json(run / "kernels.json")}
    assert kernels["group_norm"] == kernels["adamw"] == "torch" and "fp8_linear" not in kernels


def test_what_needs_no_proof(preset: Path, config: Config, sd_perf: Any) -> None:
    for options in (
        ["--model.implementation", "plain"],
        ["--mlperf.division", "none", "--run.dir", preset.parent / "b"],
    ):
        assert sd_perf("train", "--config", preset, *options)[0] == 0


def row(level: str, name: str, **changes: Any) -> dict[str, Any]:
    numbers = {"max_error": 1e-7, "max_budget": 4e-7, "rms_error": 1e-7, "rms_budget": 8e-7}
    return {"level": level, "name": name, "ok": True, **numbers, **changes}


def test_the_verdict_names_three_that_are_wrong() -> None:
    rows = [row("op", name, ok=False) for name in "abcd"]
    record = {"levels": ["op"], "rows": [*rows, row("op", "e")]}
    assert verdict(record) == "red: 4 of 5 comparisons (op: a; op: b; op: c, ...)"
    assert verdict({**record, "rows": rows[:0]}) == "green: 0 comparisons at 1 levels"


def test_rows_by_level_have_the_order_of_levels() -> None:
    rows = [row("step", "a"), row("op", "b"), row("step", "c")]
    by_level = [
        (level, [line["name"] for line in some]) for level, some in rows_by_level({"rows": rows})
    ]
    assert by_level == [("op", ["b"]), ("step", ["a", "c"])]


def test_closest_to_its_limit() -> None:
    rows = [row("op", "a"), row("op", "b", rms_error=4e-7), row("op", "c", max_budget="inf")]
    assert closest_to_limit(rows) == "b: 50 % of what is allowed"
    equal = row("step", "draws", max_error=0.0, max_budget=0.0, rms_error=0.0, rms_budget=0.0)
    assert closest_to_limit([equal]) == "all equal"
