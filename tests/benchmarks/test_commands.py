"""Every command in its tiny form on a CPU: its result has the schema, bad input is a sentence."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ladder, scaling
from sd_perf.tools.report.benchmarks import write_benchmarks
from sd_perf.tools.results import Result, read_any

QUICK = ["--warm-up-steps", "2"]
COMMANDS = {
    "throughput": ["--minutes", "0.001", *QUICK],
    "ladder": ["--seconds", "0.05", *QUICK],
    "data": [],
    "data_index": [],
    "conversion": [],
    "evaluation": [],
    "evaluation_rivals": [],
    "kernels": ["--ops", "geglu", "residual_add"],
    "cpu_comparisons": [],
    "scaling": ["--minutes", "0.001", *QUICK],
}
PRECOMPUTED = ["--set", "data.context=precomputed"]
PACKAGES = {
    "data": "webdataset",
    "conversion": "PIL",
    "evaluation": "open_clip",
    "cpu_comparisons": "diffusers",
    "evaluation_rivals": "transformers",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("results")


def run(name: str, *arguments: object) -> int:
    return importlib.import_module(f"benchmarks.{name}").main([str(each) for each in arguments])


def written(name: str, folder: Path) -> Result[Any]:
    """The result of a command's tiny form, run once for the module."""
    path = folder / f"{name}.json"
    if not path.exists():
        if name in PACKAGES and find_spec(PACKAGES[name]) is None:
            pytest.skip(f"needs {PACKAGES[name]}")
        assert run(name, "--tiny", *COMMANDS[name], "--output", path) == 0
    return read_any(path)


# scaling starts processes, so that only its own test below runs it
@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "scaling"])
def test_the_tiny_form(name: str, folder: Path) -> None:
    check(written(name, folder), name)


def check(result: Result[Any], name: str) -> None:
    assert result.benchmark == name and result.rows
    assert result.provenance.command.startswith(f"python -m benchmarks.{name} --tiny")
    assert any(row.get("status", "measured") == "measured" for row in result.rows)
    for row in result.rows:
        assert row.get("status", "measured") == "measured" or row["reason"]


def test_their_results_make_a_page(folder: Path) -> None:
    results = [written(name, folder) for name in ("throughput", "ladder")]
    page = write_benchmarks(folder).read_text(encoding="utf-8")
    assert all(f"<h2>{result.benchmark}</h2>" in page for result in results)
    assert "Damaged" not in page and "7 graph" in page


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_and_in_which_unit(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        run(name, "--help")
    words = " ".join(capsys.readouterr().out.split())
    assert (
        left.value.code == 0
        and f"python -m benchmarks.{name.replace('kernels', 'kernel')}" in words
    )
    assert "samples" in words or "pictures" in words or "CPU arithmetic" in words


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("throughput", ["--minutes", "0"], "--minutes: 0 cannot be used"),
        ("throughput", ["--set", "precision"], "write section.field=value"),
        ("throughput", ["--set", "training.seed=[1"], "'[1' cannot be read as YAML"),
        ("throughput", ["--set", "training.precision=fp64"], "training.precision: 'fp64'"),
        ("throughput", ["--shards", "x"], "--shards: nothing reads them"),
        ("throughput", ["--source", "moments"], "data.path"),
        ("throughput", ["--source", "moments", "--shards", "nowhere", *PRECOMPUTED], "nowhere"),
        ("throughput", ["--batch", "-1"], "--batch: -1 cannot be used"),
        ("throughput", ["--config", "nowhere.yaml"], "nowhere.yaml: no such config file"),
        ("ladder", ["--seconds", "-3"], "--seconds: -3 cannot be used"),
        ("scaling", ["--ranks", "0"], "--ranks, --batches: give 1 or more"),
        ("scaling", ["--set", "model.width=3"], "model.width"),
        ("data", ["--epochs", "0"], "give 1 or more"),
        ("evaluation", ["--pictures", "0"], "give 1 or more"),
        ("evaluation", ["--config", "configs/train_512_moments.yaml"], "names no file"),
        ("cpu_comparisons", ["--turns", "0"], "give 1 or more"),
    ],
)
def test_bad_input_is_one_sentence(
    name: str,
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    tiny = [] if name in ("data", "evaluation") else ["--tiny"]
    assert run(name, *tiny, *arguments) == 2
    [sentence] = capsys.readouterr().err.splitlines()
    assert sentence.startswith(f"python -m benchmarks.{name}: ") and words in sentence


def test_an_output_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "rows.json"
    assert run("kernels", "--tiny", "--ops", "geglu", "--output", output) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_throughput_counts_what_the_trainer_did(folder: Path) -> None:
    [row] = written("throughput", folder).rows
    assert (row["batch"], row["ranks"], row["source"]) == (4, 1, "synthetic")
    assert row["cached"] == "moments, text states" and row["dtype"] == "fp32"
    assert row["samples_per_second"] == row["samples_per_second_per_rank"] > 0
    assert row["curve"]["samples"][-1] == 4 * row["timed_iterations"]
    assert 0 <= row["data_wait"] < 1 and 0 < row["loss_end"] < 10
    # A tiny network has no MFU of the benchmark's, and a CPU no clock that is told.
    assert row["mfu"] is row["sm_clock_mhz"] is row["power_w"] is None


def test_the_ladder_names_the_rungs_it_left_out(folder: Path) -> None:
    rows = written("ladder", folder).rows
    assert [row["rung"] for row in rows] == [
        f"{number} {rung.name}" for number, rung in enumerate(ladder.RUNGS, 1)
    ]
    by_name = {row["rung"][2:]: row for row in rows}
    absent = {name: row["reason"] for name, row in by_name.items() if row["status"] == "absent"}
    assert absent.keys() == {"cuDNN attention", "graph", "FP8"}
    assert absent["graph"] == "needs a CUDA GPU, this is cpu"
    assert [by_name[name]["implementation"] for name in ("channels-last", "fused ops")] == [
        "plain",
        "fast",
    ]
    assert by_name["plain fp32"]["dtype"] == "fp32" and by_name["autocast"]["dtype"] == "bf16"
    assert by_name["plain fp32"]["ratio"] == 1 and by_name["flat AdamW"]["ratio_to_previous"] > 0


def test_a_rung_that_fails_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(number: int, *_: object) -> Any:
        raise MemoryError("out of memory" if number == 1 else "odd")

    monkeypatch.setattr(ladder, "time_rung", fail)
    output = tmp_path / "x.json"
    assert run("ladder", "--tiny", "--rungs", 1, 3, "--output", output) == 1
    rows = read_any(output).rows
    assert [(row["status"], row["reason"]) for row in rows] == [
        ("out of memory", "out of memory"),
        ("failed", "odd"),
    ]


@pytest.mark.slow
def test_scaling_runs_two_ranks(folder: Path) -> None:
    result = written("scaling", folder)
    check(result, "scaling")
    [row] = result.rows
    assert (row["strategy"], row["ranks"], row["status"]) == ("ddp", 2, "measured")
    assert row["samples_per_second"] == pytest.approx(2 * row["samples_per_second_per_rank"])


def test_scaling_tells_why_a_run_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    errors = (
        "Traceback\nValueError: odd\npython -m benchmarks.throughput: no memory\nChildFailedError"
    )

    def start(command: list[str], ranks: int, seconds: float) -> Any:
        assert command[command.index("--nproc-per-node") + 1] == str(ranks) and seconds > 60
        output = Path(command[command.index("--output") + 1])
        if ranks == 1:
            write_row(output)
        return subprocess.CompletedProcess(command, 1 - (ranks == 1), "", errors)

    def write_row(path: Path) -> None:
        assert run("throughput", "--tiny", *COMMANDS["throughput"], "--output", path) == 0

    monkeypatch.setattr(scaling, "start", start)
    output = tmp_path / "scaling.json"
    arguments = ["--tiny", "--ranks", 2, 1, "--batches", 4, "--set", "training.precision=fp32"]
    assert run("scaling", *arguments, "--output", output) == 1
    alone, two = read_any(output).rows
    assert (alone["ranks"], alone["strategy"], alone["efficiency"]) == (1, "single", 1.0)
    assert (two["status"], two["reason"]) == (
        "failed",
        "python -m benchmarks.throughput: no memory",
    )


def test_one_more_switch_a_rung() -> None:
    for number in range(1, len(ladder.RUNGS) + 1):
        below, here = ladder.changes_up_to(number - 1), ladder.changes_up_to(number)
        rung = ladder.RUNGS[number - 1]
        keys = {text.partition("=")[0] for text in set(here) - set(below)}
        assert keys == {key for key, _ in rung.changes}
        switches = len(rung.changes) + rung.channels_last + rung.cudnn_attention
        assert switches == (2 if number == 1 else 1)


def test_results_say_the_command_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.command import command_line

    assert command_line("data", ["--shards", "a b"]) == "python -m benchmarks.data --shards 'a b'"
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert command_line("x", []) == "torchrun --nproc-per-node 8 -m benchmarks.x"


def test_every_row_is_json_for_any_reader(folder: Path) -> None:
    written("throughput", folder)
    for path in folder.glob("*.json"):
        assert not re.search(r"NaN|Infinity", json.dumps(json.loads(path.read_text())))
