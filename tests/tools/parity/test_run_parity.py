"""`sd-perf parity`: what it runs, writes and says."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sd_perf.config import Config
from sd_perf.files import write_json
from sd_perf.runs.parity_record import RECORD_NAME, record_folder
from sd_perf.tools.parity import run_parity
from sd_perf.tools.parity.__main__ import main as child_main
from sd_perf.tools.parity.comparison import Comparison
from tests.runs.test_parity_record import config, preset, sd_perf
from tests.tools.parity.comparisons import GOOD, WRONG

__all__ = ["config", "preset", "sd_perf"]


def part(*lines: Comparison, launches: dict[str, int] | None = None) -> dict[str, Any]:
    """What one process answers."""
    return {
        "where": "structure",
        "rows": [line.as_dict() for line in lines],
        "executed": {"geglu": {"triton": 3}},
        "triton_launches": {"geglu_forward_kernel": 3} if launches is None else launches,
        "notes": ["a note"],
        "curves": {},
    }


@pytest.mark.slow
def test_a_level_in_both_processes(preset: Path, config: Config, sd_perf: Any) -> None:
    code, output, errors = sd_perf("parity", "--config", preset, "--level", "unet")
    assert code == 0, output + errors
    assert "green: 2 comparisons at 1 levels" in output and "group_norm_forward_kernel" in output
    record = json.loads((record_folder(config) / RECORD_NAME).read_text())
    assert {row["where"] for row in record["rows"]} == {"interpreter", "structure"}
    assert record["executed"]["interpreter"]["group_norm"].keys() == {"triton"}
    assert record["executed"]["structure"]["group_norm"].keys() == {"torch"}
    assert "green: 2 comparisons" in (record_folder(config) / "parity.html").read_text()


@pytest.mark.slow
def test_bad_input_of_a_child_is_its_sentence(preset: Path, config: Config, sd_perf: Any) -> None:
    options = [
        "--text-encoder.model",
        "no-model",
        "--text-encoder.weights",
        "random",
        "--level",
        "block",
    ]
    code, _, errors = sd_perf("parity", "--config", preset, *options)
    assert code == 2 and "ended with 2: it said why above" in errors
    assert not (record_folder(config) / RECORD_NAME).exists()


def test_a_child_that_ends_with_an_error(
    preset: Path, config: Config, sd_perf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = tmp_path / "child"
    child.write_text("#!/bin/sh\nexit 2\n")
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))
    code, _, errors = sd_perf("parity", "--config", preset, "--level", "block")
    assert code == 2 and "ended with 2: it said why above" in errors
    assert not (record_folder(config) / RECORD_NAME).exists()


def test_a_child_says_bad_input_in_one_sentence(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = dataclasses.replace(config.text_encoder, model="no-model", weights="random")
    asked = {
        "config": dataclasses.asdict(dataclasses.replace(config, text_encoder=text)),
        "where": "structure",
        "levels": ["block"],
        "folder": str(tmp_path),
        "answer": str(tmp_path / "answer.json"),
    }
    write_json(tmp_path / "request.json", asked)
    assert child_main(tmp_path / "request.json") == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("sd-perf: ") and "no-model" in line
    assert not (tmp_path / "answer.json").exists()


def answered(monkeypatch: pytest.MonkeyPatch, *parts: dict[str, Any]) -> None:
    monkeypatch.setattr(run_parity, "_run_children", lambda *_: list(parts))


def test_red_is_exit_code_1_and_names_the_row(
    preset: Path, config: Config, sd_perf: Any, monkeypatch: Any
) -> None:
    answered(monkeypatch, part(GOOD, WRONG))
    code, output, _ = sd_perf("parity", "--config", preset)
    assert code == 1
    assert (
        "red: 1 of 2 comparisons (block: input_blocks.1.0 (ResBlock))" in output
        and "a note" in output
    )
    assert json.loads((record_folder(config) / RECORD_NAME).read_text())["ok"] is False
    code, output, _ = sd_perf("parity", "--config", preset, "--json")
    assert code == 1 and json.loads(output)["rows"][1]["ok"] is False


def test_no_triton_kernel_is_red(preset: Path, sd_perf: Any, monkeypatch: Any) -> None:
    answered(monkeypatch, part(GOOD, launches={}))
    code, output, _ = sd_perf("parity", "--config", preset)
    assert code == 1 and "Triton kernels that ran" in output


def test_an_earlier_record_keeps_its_other_levels(
    preset: Path, config: Config, sd_perf: Any, monkeypatch: Any
) -> None:
    answered(monkeypatch, part(WRONG))
    assert sd_perf("parity", "--config", preset, "--level", "block")[0] == 1
    answered(monkeypatch, part(GOOD, launches={}))
    code, output, _ = sd_perf("parity", "--config", preset, "--level", "trajectory")
    assert code == 1 and "red: 1 of 2 comparisons" in output
    path = record_folder(config) / RECORD_NAME
    record = json.loads(path.read_text())
    assert record["levels"] == ["block", "trajectory"] and len(record["rows"]) == 2
    path.write_text(json.dumps({**record, "code": "another"}))
    assert sd_perf("parity", "--config", preset, "--level", "trajectory")[0] == 0
    assert json.loads(path.read_text())["levels"] == ["trajectory"]
