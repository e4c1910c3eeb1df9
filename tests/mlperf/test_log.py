"""The MLPerf log: its lines and their order, resumed runs, damaged files."""

import json
import sys
from pathlib import Path

import pytest

from sd_perf.errors import ConfigError, DataError, UserError
from sd_perf.mlperf.log import MLPerfLog, logged_scores, read_log

pytest.importorskip("mlperf_logging")

ONCE = [
    "submission_division",
    "submission_benchmark",
    "init_start",
    "init_stop",
    "run_start",
    "seed",
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
    "cache_clear",
    "run_stop",
]


def keys(path) -> list[str]:
    return [event.key for event in read_log(path)]


def values(path) -> dict:
    return {event.key: event.value for event in read_log(path)}


def begin(path, config) -> MLPerfLog:
    log = MLPerfLog(path, config)
    log.start_init(1000)
    log.describe(seed=7, train_samples=100)
    log.start_run()
    return log


def test_lines_are_whole_and_in_order(write_log):
    path = write_log()
    order = keys(path)
    assert [key for key in ONCE if order.count(key) != 1] == []
    places = [
        order.index(key)
        for key in ("submission_division", "init_start", "seed", "init_stop", "run_start")
    ]
    assert places == sorted(places)
    found = values(path)
    assert found["opt_base_learning_rate"] == pytest.approx(2.3e-7 * 512)
    assert (
        found["seed"] == 12345 and found["eval_samples"] == 30_000 and found["cache_clear"] is True
    )
    line = json.loads(path.read_text().splitlines()[0].removeprefix(":::MLLOG "))
    assert line["metadata"]["file"] == "tests/mlperf/conftest.py"  # no path of this machine


def test_a_decay_of_the_learning_rate_is_logged(closed, tmp_path):
    decaying = closed(optimizer={"decay_steps": 400, "decay_end": 0.05})
    begin(tmp_path / "decaying.txt", decaying)
    begin(tmp_path / "constant.txt", closed())
    key = "opt_learning_rate_decay_"
    decay = {k: v for k, v in values(tmp_path / "decaying.txt").items() if k.startswith(key)}
    assert decay == {f"{key}schedule": "linear", f"{key}steps": 400, f"{key}factor": 0.05}
    assert not any(k.startswith(key) for k in keys(tmp_path / "constant.txt"))


def test_run_stop_is_the_end_of_the_first_passing_block(write_log):
    stop = read_log(write_log())[-1]
    assert (stop.key, stop.time_ms) == ("run_stop", 3 * 3_600_000)
    assert stop.metadata["status"] == "success" and stop.metadata["samples_count"] == 1_536_000


def test_run_that_passes_nowhere_is_aborted_at_its_end(write_log):
    stop = read_log(write_log(scores={1_536_000: (95.0, 0.2), 2_048_000: (80.0, 0.1499)}))[-1]
    assert stop.metadata["status"] == "aborted" and stop.time_ms == 4 * 3_600_000


def test_conclusion_stands(write_log, closed):
    path = write_log(scores={512_000: (100.0, 0.1)})
    log = MLPerfLog(path, closed())
    log.add_evaluation(1_024_000, 50.0, 0.2, 1, 2)
    assert log.conclude() == "aborted" and keys(path).count("run_stop") == 1
    with pytest.raises(UserError, match="has its run_stop"):
        log.start_run()


def blocks(path) -> list[tuple[str, int]]:
    events = read_log(path)
    return [(e.key, e.metadata["samples_count"]) for e in events if e.key.startswith("block")]


def test_resume_repeats_nothing(closed, tmp_path):
    path = tmp_path / "result_0.txt"
    begin(path, closed()).start_block(0)
    begin(path, closed()).start_block(300_000)  # stopped inside the first block: the block goes on
    log = begin(path, closed())
    log.stop_block(512_000)
    log.start_block(512_000)
    order = keys(path)
    assert [key for key in ONCE if key != "run_stop" and order.count(key) != 1] == []
    assert blocks(path) == [("block_start", 0), ("block_stop", 512_000), ("block_start", 512_000)]


def test_blocks_that_are_trained_again_are_set_aside(closed, tmp_path):
    """Killed before the checkpoint of 512,000 was complete: the first block goes on."""
    path = tmp_path / "result_0.txt"
    log = begin(path, closed())
    log.start_block(0)
    start = read_log(path)[-1].time_ms
    log.stop_block(512_000, time_ms=start + 60_000)
    log.start_block(512_000)
    log.start_block(0)  # with the file open, too
    assert blocks(path) == [("block_start", 0)] and "tracked_stats" not in keys(path)
    aside = (tmp_path / "mlperf.superseded.txt").read_text().splitlines()
    assert [json.loads(line.removeprefix(":::MLLOG "))["key"] for line in aside] == [
        "block_stop",
        "tracked_stats",
        "block_start",
    ]
    log.stop_block(512_000, time_ms=start + 100_000)
    stats = read_log(path)[-1]
    assert stats.key == "tracked_stats" and stats.value["throughput"] == 5120.0


def test_what_published_logs_have(closed, tmp_path):
    path = tmp_path / "result_0.txt"
    log = begin(path, closed())
    log.start_block(0)
    start = read_log(path)[-1].time_ms
    log.stop_block(512_000, time_ms=start + 512_000, max_memory=30.5)
    events = {event.key: event for event in read_log(path)}
    assert events["block_start"].value == events["block_stop"].value == "training_step"
    assert events["tracked_stats"].value == {
        "throughput": 1000.0,
        "train_step_time": 0.512,
        "max_memory_usage": 30.5,
    }
    assert events["tracked_stats"].metadata.items() >= {"samples_count": 512_000}.items()
    log.conclude()
    stop = read_log(path)[-1]
    assert stop.metadata["status"] == "aborted" and stop.metadata["step_num"] == 1000
    assert stop.metadata["file"] == "tests/mlperf/test_log.py"


@pytest.mark.parametrize("length", [5, 40, None], ids=["token", "middle", "all but the line's end"])
def test_line_cut_off_by_a_kill(closed, tmp_path, length):
    """A resumed run writes the line again, whole, and the others stay."""
    path = tmp_path / "result_0.txt"
    begin(path, closed())
    whole = keys(path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:length])  # run_start
    begin(path, closed())
    assert keys(path) == whole


def test_damaged_line_is_told(closed, tmp_path):
    path = tmp_path / "result_0.txt"
    begin(path, closed())
    path.write_text(path.read_text().replace('"key": "seed"', '"kee": "seed"'))
    with pytest.raises(DataError, match=r"result_0\.txt: line 8 is damaged"):
        MLPerfLog(path, closed())


@pytest.mark.parametrize(
    ("was", "now", "sentence"),
    [
        ('"samples_count": 512000', '"samples_count": "x"', "samples_count is 'x', not a whole"),
        ('"samples_count": 512000', '"x": 512000', "lacks 'samples_count'"),
        ('"value": 70.0', '"value": [70.0]', r"eval_accuracy cannot be used \(value is"),
        ('"value": 70.0', '"value": 1e400', "is damaged .1e400 is too large"),
        ('"value": 70.0', '"value": ' + "[" * 99_000, "is damaged .*nested"),
        ('"value": 70.0', '"value": ' + "9" * 2_000_000, r"has 1,048,576 characters or more"),
    ],
)
def test_a_hostile_log_of_the_run(was, now, sentence, write_log, closed):
    path = write_log()
    MLPerfLog(path, closed()).add_evaluation(512_000, 70.0, 0.2, 1, 2)
    text = path.read_text()
    assert was in text
    path.write_text(text.replace(was, now))
    with pytest.raises(DataError, match=sentence) as told:
        MLPerfLog(path, closed())
    assert len(str(told.value)) < 600


def test_launchers_prefix_is_ignored(closed, tmp_path):
    path = tmp_path / "result_0.txt"
    begin(path, closed())
    expected = read_log(path)
    path.write_text(
        "srun: hello\n" + "".join(f"0: {line}\n" for line in path.read_text().splitlines())
    )
    assert [e._replace(line=e.line - 1) for e in read_log(path)] == expected


def test_last_score_of_a_checkpoint_counts(write_log, closed):
    path = write_log()
    MLPerfLog(path, closed()).add_evaluation(512_000, 70.0, 0.2, 1, 2)
    assert logged_scores(read_log(path))[512_000] == {"FID": 70.0, "CLIP": 0.2}


def test_bad_use(closed, tmp_path):
    log = begin(tmp_path / "result_0.txt", closed())
    with pytest.raises(ValueError, match="cannot be logged"):
        log.add_evaluation(512_000, float("nan"), 0.2, 1, 2)
    with pytest.raises(UserError, match="no block has ended"):
        log.conclude()
    with pytest.raises(DataError, match="no such MLPerf log"):
        read_log(tmp_path / "absent.txt")


def test_full_disk_is_told(closed):
    log = MLPerfLog(Path("/dev/full"), closed())
    with pytest.raises(UserError, match="/dev/full: cannot be written"):
        log.start_init()


def test_missing_package_is_told(closed, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("mlperf_logging")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mlperf_logging", None)
    with pytest.raises(ConfigError, match=r"pip install 'sd-perf\[mlperf\]'"):
        MLPerfLog(tmp_path / "result_0.txt", closed())
