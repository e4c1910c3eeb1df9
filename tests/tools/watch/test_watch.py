"""`sd-perf watch`: what it shows of a run, of a damaged one, and of one that goes on."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from sd_perf.console import TextConsole
from sd_perf.errors import UserError
from sd_perf.runs.lock import RunLock
from sd_perf.tools.watch import watch_run
from sd_perf.tools.watch.follow import FollowedLines
from sd_perf.tools.watch.screen import duration, screen, sparkline
from sd_perf.tools.watch.status import Status, Watcher
from tests.tools.report.test_report import write_bare, write_full, write_lines


def shown(status: Status, width: int = 100) -> str:
    console = TextConsole(width=width)
    with console.capture() as captured:
        console.print(screen(status, width))
    return captured.get()


def test_a_run_under_way(tmp_path: Path) -> None:
    run = write_bare(tmp_path / "run")  # 2,560 of 6,400 samples at 50 samples/s
    (run / "checkpoints/samples_0000001280").mkdir(parents=True)
    an_hour_ago = time.time() - 3661
    os.utime(run / "checkpoints/samples_0000001280", (an_hour_ago, an_hour_ago))
    write_lines(run / "scores.jsonl", [{"samples": 1280, "fid": 40.5, "judge": 0.25, "n": 256}])
    with RunLock() as lock:
        lock.take(run)
        text = shown(Watcher(run).look())
    for words in (
        f"running on {os.uname().nodename}, process {os.getpid()}",
        "2,560 of 6,400",
        "40 %",
        "0.0250, at first 1.0000",
        "50.0 samples/s",
        "77 s, done about",
        "at 1,280 samples, 1 h 1 min ago",
        "at 1,280: FID 40.50, judge 25.0 %, n 256",
    ):
        assert words in text, words
    assert "not running" in shown(Watcher(run).look())


def test_scores_of_the_average(tmp_path: Path) -> None:
    run = write_full(tmp_path / "run")
    write_lines(run / "scores_ema.jsonl", [{"samples": 6400, "fid": 9.5, "n": 256}])
    text = shown(Watcher(run).look())
    assert "at 6,400: FID 12.35" in text
    assert "at 6,400: FID of the average 9.50, n 256" in text


def test_a_complete_run_and_a_narrow_terminal(tmp_path: Path) -> None:
    run = write_full(tmp_path / "run")
    assert Watcher(run).look().is_complete
    text = shown(Watcher(run).look(), width=40)
    assert "complete" in text and "left" not in text
    assert all(len(line) <= 40 for line in text.splitlines())


def test_a_run_that_has_not_logged_yet(tmp_path: Path) -> None:
    run = write_bare(tmp_path / "run")
    (run / "metrics.jsonl").unlink()
    text = shown(Watcher(run).look())
    assert "no step is logged yet" in text and "none yet" in text


def test_a_killed_run_is_silent(tmp_path: Path) -> None:
    run = write_bare(tmp_path / "run")
    (run / ".lock").write_text("anna, process 7, since noon\n")  # as kill -9 leaves it
    assert Watcher(run).look().state == "running on anna, process 7, since noon"
    os.utime(run / "metrics.jsonl", (time.time() - 600, time.time() - 600))
    assert Watcher(run).look().state.startswith("silent: killed, or busy")


def test_a_lock_that_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    run = write_bare(tmp_path / "run")
    os.mkfifo(run / ".lock")
    assert Watcher(run).look().state == "not running"


def test_lines_are_read_as_they_come(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = FollowedLines(path, ("samples",))
    lines.read()
    assert lines.objects == [] and lines.written_at is None
    with path.open("a") as file:
        file.write('{"samples": 1}\n{"samp')
        file.flush()
        lines.read()
        assert lines.objects == [{"samples": 1}]
        file.write('les": 2}\nnonsense\n{"samples": true}\n')
        file.flush()
        lines.read()
    assert lines.objects == [{"samples": 1}, {"samples": 2}] and lines.damaged == 2
    other = tmp_path / "other"
    other.write_text('{"samples": 1}\n')
    other.replace(path)  # as a resumed run does
    lines.read()
    assert lines.objects == [{"samples": 1}] and lines.damaged == 0


def test_lines_without_an_end(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b"x" * (2**20 + 5))
    with pytest.raises(UserError, match="a line has 1,048,576 bytes or more"):
        FollowedLines(tmp_path / "metrics.jsonl", ()).read()


@pytest.mark.parametrize(
    ("values", "width", "curve"),
    [
        ([], 10, ""),
        ([2.0], 10, "▁"),
        ([1.0, 2.0, 128.0], 10, "▁▂█"),
        ([8.0, 8.0, 1.0, 1.0], 2, "█▁"),
        ([0.0, 1.0], 5, "▁█"),
    ],
)
def test_sparkline(values: list[float], width: int, curve: str) -> None:
    assert sparkline(values, width) == curve


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (3700, "1 h 1 min"), (180_000, "2 d 2 h")],
)
def test_duration(seconds: float, words: str) -> None:
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("run_manifest.json", "{", "run_manifest.json: cannot be read"),
        ("run_manifest.json", '{"config": [], "starts": []}', "holds no config and starts"),
        ("run_manifest.json", None, "is no run folder"),
    ],
)
def test_a_damaged_folder_is_one_sentence(name, content, sentence, tmp_path, refused) -> None:
    run = write_bare(tmp_path / "run")
    (run / name).unlink()
    if content is not None:
        (run / name).write_text(content)
    assert sentence in refused("watch", run, "--once")


def test_in_a_pipe_a_line_is_printed_where_something_changed(
    tmp_path, sd_perf, monkeypatch
) -> None:
    run, waits = write_bare(tmp_path / "run"), []

    def sleep(seconds: float) -> None:
        """Nothing changes in the first two waits; in the third the run ends."""
        waits.append(seconds)
        if len(waits) < 3:
            return
        last = {"samples": 6400, "loss": 0.01, "lr": 1, "samples_per_second": 50, "data_wait": 0}
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(last) + "\n")

    monkeypatch.setattr(watch_run, "time", SimpleNamespace(sleep=sleep))
    code, output, _ = sd_perf("watch", run, "--every", "0.1")
    first, last = output.splitlines()
    assert code == 0 and waits == [0.1] * 3
    assert first == f"{run}: 2,560 of 6,400, loss 0.0250, 50.0 samples/s, 77 s left, not running"
    assert last == f"{run}: 6,400 of 6,400, loss 0.0100, 50.0 samples/s, complete"


def test_how_often(tmp_path, refused) -> None:
    assert "--every: 0.0 cannot be used" in refused("watch", tmp_path, "--every", "0")


def test_an_end_that_is_further_off_than_any_clock(tmp_path: Path) -> None:
    run = write_bare(tmp_path / "run")
    line = {"samples": 8, "loss": 0.5, "lr": 1e-4, "samples_per_second": 5e-324, "data_wait": 0}
    write_lines(run / "metrics.jsonl", [line])
    (run / ".lock").write_text("host, process 1")
    assert "left" not in shown(Watcher(run).look())
