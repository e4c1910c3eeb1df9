"""Verdicts of the official checker: our logs, faulty ones, published ones."""

import logging
from pathlib import Path

import pytest

from sd_perf.errors import DataError
from sd_perf.mlperf.compliance import check_log

pytest.importorskip("mlperf_logging")

RULESETS = {"v3.1": "3.1.0", "v4.0": "4.0.0", "v5.0": "5.0.0"}
REQUIRED = [
    "submission_division",
    "submission_benchmark",
    "cache_clear",
    "init_start",
    "init_stop",
    "run_start",
    "run_stop",
    "block_start",
    "block_stop",
    "eval_accuracy",
    "train_samples",
    "eval_samples",
    "gradient_accumulation_steps",
    "global_batch_size",
    "opt_name",
    "opt_adamw_beta_1",
    "opt_adamw_beta_2",
    "opt_adamw_epsilon",
    "opt_adamw_weight_decay",
    "opt_base_learning_rate",
    "opt_learning_rate_warmup_steps",
]


def without(path: Path, *parts: str) -> Path:
    """A copy of the log without the lines that contain all the given parts."""
    lines = path.read_text().splitlines(keepends=True)
    left = [line for line in lines if not all(part in line for part in parts)]
    assert len(left) < len(lines)
    path.write_text("".join(left))
    return path


def test_our_log_passes_in_the_closed_division(write_log):
    verdict = check_log(write_log(), "closed")
    assert verdict.passed and verdict.findings == () and verdict.status == "success", str(verdict)
    assert "passes the official compliance checker (ruleset 5.0.0, closed division)" in str(verdict)


@pytest.mark.parametrize("ruleset", ["4.0.0", "4.1.0"])
def test_our_log_passes_older_rulesets(write_log, ruleset):
    verdict = check_log(write_log(), "closed", ruleset)
    assert verdict.passed, str(verdict)


def test_our_log_of_the_open_division(write_log, closed):
    config = closed(
        mlperf={"division": "open"}, evaluation={"num_prompts": 256}, optimizer={"beta_2": 0.95}
    )
    path = write_log(config, scores={512_000: (300.0, 0.1), 1_024_000: (200.0, -0.1)})
    verdict = check_log(path, "open")
    assert verdict.passed and verdict.status == "aborted", str(verdict)
    assert "did not converge" in str(verdict)
    refused = check_log(path, "closed")
    assert not refused.passed and "declares open division, not closed" in str(refused)


@pytest.mark.parametrize("key", REQUIRED)
def test_every_required_key_is_missed(write_log, key):
    verdict = check_log(without(write_log(), f'"key": "{key}"'), "closed")
    assert not verdict.passed
    assert key in str(verdict)


def test_findings_are_words(write_log, closed):
    path = write_log(closed(optimizer={"beta_1": 0.8}), scores={512_000: (91.0, 0.2)})
    text = str(check_log(path))
    lines = path.read_text().splitlines()
    number = next(n for n, line in enumerate(lines, 1) if "beta_1" in line)
    rule = "opt_adamw_beta_1 is 0.8: it must be 0.9; train with that, or log the open division"
    assert f"line {number}: {rule}" in text
    assert "evaluations with both FID and CLIP: must stand at least twice, found 1" in text
    assert (
        "no evaluation passes: the target is FID <= 90 and CLIP >= 0.15; the last one, at" in text
    )
    assert "512000, has FID 91.0 and CLIP 0.2" in text
    assert (
        "fails the official compliance checker (ruleset 5.0.0, closed division)"
        in text.splitlines()[0]
    )


def test_fid_without_clip(write_log):
    verdict = check_log(without(write_log(), '"metric": "CLIP"', "1536000"))
    assert not verdict.passed and "FID without CLIP" in str(verdict)


def test_run_stop_without_status(write_log):
    path = write_log()
    path.write_text(path.read_text().replace('"status": "success"', '"state": "success"'))
    verdict = check_log(path)
    assert not verdict.passed and "run_stop is null: its metadata must hold a status" in str(
        verdict
    )


def test_order_is_told(write_log):
    path = write_log()
    path.write_text(
        "".join(
            sorted(path.read_text().splitlines(keepends=True), key=lambda line: "run_start" in line)
        )
    )
    verdict = check_log(path)
    assert not verdict.passed
    lines = path.read_text().splitlines()
    stop = next(number for number, line in enumerate(lines, 1) if '"run_stop"' in line)
    words = f"line {stop}: run_stop is null: run_start must come before it; put the lines in the"
    assert words in str(verdict)


def test_slow_init_is_told(write_log):
    path = write_log()
    lines = path.read_text().splitlines()
    place = next(i for i, line in enumerate(lines) if '"init_start"' in line)
    lines[place] = lines[place].replace('"time_ms": ', '"time_ms": -')
    path.write_text("\n".join(lines) + "\n")
    assert "initialisation must take less than 30 minutes" in str(check_log(path))


def test_warnings_are_told_of_a_log_that_passes(write_log):
    path = write_log()
    twice = next(line for line in path.read_text().splitlines() if '"opt_name"' in line)
    path.write_text(path.read_text() + twice + "\n")
    verdict = check_log(path)
    assert verdict.passed and "warning: opt_name: must stand exactly once, found 2" in str(verdict)


def test_bad_input(write_log, tmp_path):
    with pytest.raises(DataError, match="no such MLPerf log"):
        check_log(tmp_path / "absent.txt")
    with pytest.raises(DataError, match=r"ruleset 6\.0\.0"):
        check_log(write_log(), ruleset="6.0.0")
    empty = tmp_path / "empty.txt"
    empty.write_text("no log line\n")
    assert not check_log(empty).passed
    damaged = tmp_path / "damaged.txt"
    damaged.write_text(":::MLLOG {not json\n")
    assert "line 1 is damaged" in str(check_log(damaged))


def test_published_logs(real_data, monkeypatch):
    """Our verdict on each published log equals that of the checker called as a library."""
    from mlperf_logging.compliance_checker import mlp_compliance

    monkeypatch.setattr(logging.root, "handlers", [logging.NullHandler()])
    logs = sorted((real_data / "mlperf_logs").glob("v*/**/result_*.txt"))
    assert len(logs) >= 20
    for path in logs:
        round_name = path.relative_to(real_data / "mlperf_logs").parts[0]
        ruleset = RULESETS[round_name]
        official = mlp_compliance.make_checker("training", ruleset, quiet=False, werror=False)
        expected = official.check_file(str(path), f"training_{ruleset}/common.yaml")
        verdict = check_log(path, "closed", ruleset)
        assert verdict.passed == bool(expected), str(verdict)
        assert len(verdict.findings) == len(official.warnings) + len(official.overwritable)
        assert verdict.status == "success"


def test_published_log_made_bad(real_data, tmp_path):
    path = next((real_data / "mlperf_logs" / "v5.0").glob("**/result_0.txt"))
    copy = tmp_path / "result_0.txt"
    copy.write_text(path.read_text())
    assert check_log(copy, "closed").passed
    assert not check_log(without(copy, '"key": "opt_name"'), "closed").passed
