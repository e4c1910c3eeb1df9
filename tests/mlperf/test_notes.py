"""Words for logs that the official checker breaks off at, and notes on logs that pass."""

from __future__ import annotations

import json
import re

import pytest

from sd_perf.errors import ConfigError
from sd_perf.mlperf.compliance import check_log
from sd_perf.mlperf.log import read_log

pytest.importorskip("mlperf_logging")


def changed(path, name, /, **entries):
    """The log with entries of all lines of this key replaced."""
    lines = []
    for line in path.read_text().splitlines():
        entry = json.loads(line.removeprefix(":::MLLOG "))
        if entry["key"] == name:
            entry |= entries
        lines.append(":::MLLOG " + json.dumps(entry))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_damaged_line_hides_nothing(write_log, closed):
    path = write_log(closed(optimizer={"weight_decay": 0.5}))
    lines = [line for line in path.read_text().splitlines() if '"run_stop"' not in line]
    path.write_text("\n".join([":::MLLOG {not json", *lines]))
    verdict = check_log(path)
    text = str(verdict)
    assert not verdict.passed and verdict.division == "closed"
    assert "line 1 is damaged" in verdict.findings[0]
    assert "opt_adamw_weight_decay is 0.5: it must be 0.01" in text
    assert "run_stop: must stand exactly once, found 0" in text
    assert len(verdict.findings) == 3


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"samples_count": 512000, "metric"', '"step_num": 1000, "metric"', "--ruleset 3.1.0"),
        ('"metric": "FID"', '"metric": "fid"', "has CLIP and fid without FID"),
        ('"value": "closed"', '"value": "Closed"', "submission_division is 'Closed'; it must be"),
        ('"value": "stable_diffusion"', '"value": "sd"', "submission_benchmark is 'sd'"),
        ('"key": "seed", "value": 12345, ', '"key": "seed", ', "damaged (it has no 'value')"),
    ],
)
def test_why_the_checker_breaks_off(write_log, old, new, words):
    path = write_log()
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    told = str(check_log(path))
    assert words in told and "fails" in told
    assert "Error" not in told and ".yaml" not in told


def test_one_fid_without_clip_names_the_checkpoint(write_log):
    path = write_log()
    lines = path.read_text().splitlines(keepends=True)
    left = [line for line in lines if not ('"CLIP"' in line and "1536000" in line)]
    path.write_text("".join(left))
    number = next(n for n, line in enumerate(left, 1) if '"FID"' in line and "1536000" in line)
    assert check_log(path).findings == (
        f"the evaluation at 1536000 samples (line {number}) has FID without CLIP; log both metrics "
        "of a checkpoint, or none",
    )


def test_an_empty_log_has_one_finding(tmp_path):
    (tmp_path / "a.txt").write_text("")
    (finding,) = check_log(tmp_path / "a.txt").findings
    assert finding == "holds no MLPerf log lines (:::MLLOG); give the log of a run"


def test_names_with_any_letter(write_log, closed):
    """U+00C5 holds the byte 0x85 in UTF-8, which is a line break in latin-1."""
    name = "\u00c5ngstr\u00f6m"
    path = changed(write_log(), "submission_org", value=name)
    path.write_text(path.read_text().replace("\\u00c5ngstr\\u00f6m", name), encoding="utf-8")
    assert name.encode() in path.read_bytes()
    verdict = check_log(path, "closed")
    assert verdict.passed and verdict.status == "success" and verdict.findings == ()
    assert next(e.value for e in read_log(path) if e.key == "submission_org") == name


@pytest.mark.parametrize(
    ("key", "entries", "words"),
    [
        ("run_stop", {"time_ms": 9}, "run_stop is before the end of the block that passes"),
        ("run_stop", {"time_ms": -9}, "the time of run_stop is before that of run_start"),
        ("eval_samples", {"value": 256}, "eval_samples is 256, and the closed division's is 30000"),
        ("train_samples", {"value": 5}, "train_samples is 5, and the closed division's is 6513144"),
        ("seed", {"key": "sd_perf_other"}, "there is no seed"),
    ],
)
def test_notes_on_a_log_that_passes(write_log, key, entries, words):
    path = write_log()
    for start in ("init_start", "init_stop", "run_start", "block_start"):  # of the clock's time
        changed(path, start, time_ms=0)
    assert check_log(path).notes == ()
    verdict = check_log(changed(path, key, **entries))
    assert verdict.passed, str(verdict)
    assert words in str(verdict) and any(words in note for note in verdict.notes)


@pytest.mark.parametrize("text", ["a\nb", "a :::MLLOG {}", "\x1b[31m", "a\u2028b", "a\rb"])
@pytest.mark.parametrize("name", ["org", "platform"])
def test_text_that_would_make_a_log_unreadable(closed, name, text):
    with pytest.raises(ConfigError, match=rf"mlperf\.{name}: .* one line of text"):
        closed(mlperf={name: text})


def test_a_folder_of_logs_and_the_options(write_log, tmp_path, sd_perf):
    log = write_log()
    code, out, _ = sd_perf("mlperf", "check", tmp_path)
    assert code == 0 and out.count("passes the official") == 1
    bad = log.read_text().replace('"run_stop"', '"other"')
    (tmp_path / "result_7.txt").write_text(bad)
    code, out, _ = sd_perf("mlperf", "check", tmp_path)
    assert code == 1 and "passes the official" in out and "fails the official" in out
    assert "\n  - " in out, "each finding has a line of its own"
    code, out, _ = sd_perf("mlperf", "check", log, "--ruleset", "4.1.0", "--division", "open")
    assert code == 1 and "ruleset 4.1.0" in out
    assert "declares closed division, not open" in " ".join(out.split())


BROKEN = {
    "no init_start": ('"init_start"', '"other"', "init_stop is null: init_start must come before"),
    "a negative batch": ('batch_size", "value": 512', 'batch_size", "value": -1', "0 or more"),
    "a batch in words": ('batch_size", "value": 512', 'batch_size", "value": "x"', "0 or more"),
    "no accumulation": ('_steps", "value": 1,', '_steps", "value": 0,', "it must be more than 0"),
    "a list as position": (
        '"samples_count": 512000',
        '"samples_count": [1]',
        "is [1], not a number",
    ),
    "a block nowhere": ('"samples_count": 0', '"x": 0', "its metadata must hold samples_count"),
    "a block before 0": ('"samples_count": 0', '"samples_count": -1', "must not be negative"),
    "a score in words": ('"value": 140.0', '"value": "good"', "FID is 'good', not a number"),
    "a time in words": (
        '"time_ms": 3600000',
        '"time_ms": "noon"',
        "time_ms is 'noon', not a number",
    ),
    "no object": (
        ':::MLLOG {"namespace',
        ':::MLLOG [1]\n:::MLLOG {"namespace',
        "is no JSON object",
    ),
    "metadata in words": (
        '"metadata": {',
        '"metadata": "a", "b": {',
        "metadata is 'a', not an obj",
    ),
}


@pytest.mark.parametrize(("old", "new", "words"), BROKEN.values(), ids=BROKEN)
def test_findings_name_line_and_remedy(old, new, words, write_log):
    """Every finding has a line, or says how often a key must stand; none quotes Python."""
    path = write_log()
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    verdict = check_log(path)
    told = str(verdict)
    assert not verdict.passed and words in told
    for finding in verdict.findings:
        assert re.search(r"lines? \d+|must stand|no evaluation passes", finding), finding
        assert not re.search(r"Error|\.yaml|[sv]\[|Failed|breaks the rule|broke off", finding)
