"""What a user wrote is printed as it stands, by the commands that print it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sd_perf.console import TextConsole
from sd_perf.evaluation.evaluate import scores_table
from tests.cli.bad_input import FAST, write_preset
from tests.small_run import train_here

HOSTILE = "[/] [bold]b[/bold] :smile: \x1b[2J"
SHOWN = r"[/] [bold]b[/bold] :smile: \x1b[2J"


@pytest.fixture
def hostile_run(tmp_path: Path) -> Path:
    return tmp_path / "[red" / "[bold]\x1b[31m\nrun"


def test_note_and_folder_of_a_run(preset, hostile_run, capsys):
    train_here(preset, hostile_run, "--run.note", HOSTILE, *FAST)
    output = capsys.readouterr().out
    assert SHOWN in output and "\x1b" not in output
    told = next(line for line in output.splitlines() if ": starting at sample 0" in line)
    assert told.startswith(f"{hostile_run.parent}" r"/[bold]\x1b[31m\nrun: ")
    train_here(preset, hostile_run, "--resume")
    assert r"[bold]\x1b[31m\nrun: the run is complete" in capsys.readouterr().out
    train_here(preset, hostile_run, "--fresh")
    moved = r"[bold]\x1b[31m\nrun: the earlier run is now "
    assert moved in capsys.readouterr().out


def test_folder_of_scores(hostile_run, capsys):
    hostile_run.mkdir(parents=True)
    (hostile_run / "scores.jsonl").write_text('{"samples": 4, "fid": 1, "clip": 0.1, "n": 2}\n')
    TextConsole(width=100).print(scores_table(hostile_run))
    output = capsys.readouterr().out.replace("\n", "")  # a long title is wrapped
    assert r"[red/[bold]\x1b[31m\nrun" in output and "\x1b" not in output


def test_keys_and_paths_in_sentences(tmp_path, refused):
    sentence = refused("train", "--config", tmp_path / "[/]\x1b[2J\nx.yaml")
    assert r"[/]\x1b[2J\nx.yaml: no such config file" in sentence and "\x1b" not in sentence
    bad = write_preset(tmp_path / "bad.yaml", training={"[/]\x1b\n": 1})
    assert r"training.[/]\x1b\n: unknown key" in refused("train", "--config", bad)


def test_paths_of_other_commands(tmp_path, sd_perf):
    folder = tmp_path / "[bold]\x1bscenes"
    code, output, _ = sd_perf("data", "scenes", "--output", folder, "--samples", 1)
    assert code == 0 and output == f"1 scenes -> {tmp_path}/" + r"[bold]\x1bscenes" + "\n"
