"""The soak: what it reads off a run folder, and a few kills for real."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import soak
from benchmarks.soak_world import Look, Process
from sd_perf.tools.results import read


def look(logged: int, trained: int = 0, saved: int = 0, writing: str = "") -> Look:
    return Look(logged, 0, trained, saved, frozenset(writing.split()))


@pytest.mark.parametrize(
    ("before", "now", "phase"),
    [
        (look(3, saved=8, writing="old"), look(3, saved=8, writing="old"), "start-up"),
        (look(3, saved=8), look(5, 24, 8), "step"),
        (look(3, saved=8), look(5, 24, 8, "new"), "checkpoint write"),
        (look(3, saved=8, writing="old"), look(5, 24, 8, "old"), "step"),
        (look(3, saved=8), look(9, 80, 80), "evaluation and end"),
        (look(9, 80, 80), look(9, 80, 80), "evaluation and end"),
    ],
)
def test_the_phase_of_a_kill(before: Look, now: Look, phase: str) -> None:
    assert soak.phase_of(before, now, end=80) == phase


def test_a_folder_that_is_written_to(tmp_path: Path) -> None:
    assert Look.at(tmp_path / "none") == look(0)
    (tmp_path / "metrics.jsonl").write_text('{"samples": 8}\n{"samples": 16}\n{"samp')
    (tmp_path / "metrics.superseded.jsonl").write_text('{"samples": 16}\n')
    (tmp_path / "checkpoints/samples_0000000008").mkdir(parents=True)
    (tmp_path / "checkpoints/.writing_samples_0000000016.parts").mkdir()
    writing = frozenset([".writing_samples_0000000016.parts"])
    assert Look.at(tmp_path) == Look(3, 1, trained=16, saved=8, writing=writing)


def test_ranks_are_told_from_launchers_and_workers() -> None:
    def process(*words: str, rank: bool = True) -> Process:
        return Process(1, ("python", *words), frozenset(["RANK"] if rank else []))

    assert process("-m", "sd_perf", "train", "--config", "x").is_rank()
    assert process("-m", "sd_perf", "cluster", "conclude", "x", rank=False).is_rank()
    assert not process("-m", "sd_perf", "train", rank=False).is_rank()
    assert not process("-m", "sd_perf.cluster.torchrun", "train", rank=False).is_rank()
    assert not process("-c", "from multiprocessing.spawn import spawn_main").is_rank()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--rank", "-1"], "--rank: -1 cannot be used"),
        (["--steps", "3"], "--steps: 3 cannot be used"),
        ([], "is not empty; give a folder of its own"),
    ],
)
def test_bad_input_is_one_sentence(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert soak.main(["--folder", str(tmp_path), *words]) == 2
    [sentence] = capsys.readouterr().err.splitlines()
    assert told in sentence


@pytest.mark.slow
def test_kills_of_ranks_and_launchers(tmp_path: Path) -> None:
    output = tmp_path / "soak.json"
    words = ["--folder", tmp_path / "world", "--tiny", "--steps", 20, "--output", output]
    assert soak.main([str(word) for word in words]) == 0
    rows = read(output, "soak", soak.SoakRow).rows
    assert sorted(row["way"] for row in rows) == ["launcher", "launcher", "rank", "rank"]
    assert all(row["weights_equal"] and not row["orphans"] for row in rows)
    assert sum(row["samples_lost"] for row in rows) == sum(row["samples_repeated"] for row in rows)
    assert [path.name for path in (tmp_path / "world/runs").iterdir()] == ["0"]
