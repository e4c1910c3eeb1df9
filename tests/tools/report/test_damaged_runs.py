"""Reports of run folders with damaged or hostile files: what is shown, and what is refused."""

from __future__ import annotations

import json
import os
import re

import pytest

from sd_perf.errors import UserError
from sd_perf.tools.report.write_report import write_report
from tests.tools.report.test_report import words, write, write_bare, write_grid

METRICS_LINE = b'{"samples": 1, "lr": 1, "samples_per_second": 1, "data_wait": 0, "loss": %b}'


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("mlperf_verdict.json", "{", "cannot be read"),
        ("mlperf_verdict.json", '{"words": "yes"}', "is no verdict"),
        ("mlperf_verdict.json", '{"passed": 1}', "passed is 1, not true or false"),
        ("kernels.json", '[{"op": 3}]', "[0].op is 3, not text"),
        ("run_manifest.json", '{"config": {}, "starts": [], "machine": {"gpus": 8}}', "gpus is 8"),
        ("kernels.json", '{"op": "adamw"}', "is no list of kernel choices"),
        ("run_manifest.json", "{", "cannot be read"),
        ("run_manifest.json", '{"config": [], "starts": []}', "holds no config and starts"),
        ("samples/samples_0000000640.png", "not a picture", "cannot be read as a picture"),
        (
            "samples/samples_0000000640.json",
            '{"prompts": "a", "columns": 3}',
            "holds no prompts and columns",
        ),
        (
            "samples/samples_0000000640.json",
            '{"prompts": ["a"], "columns": 99}',
            "is too small for 1 rows of 99",
        ),
        ("samples/samples_64.png", "", "is not named samples_<position, 10 digits>.png"),
    ],
)
def test_bad_file(tmp_path, name, content, sentence):
    run = write_bare(tmp_path / "run")
    write_grid(run, 640, ["a"] * 6)
    (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        write_report(run)
    said = str(error.value).replace(
        ".png: is too small", ".json: is too small"
    )  # the one that two files cause
    assert str(run / name) in said and sentence in str(error.value) and "\n" not in str(error.value)
    assert not (run / "report.html").exists()


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("name", "line", "reason"),
    [
        ("metrics.jsonl", b'{"samples": 1, "lo', "cannot be read"),
        ("metrics.jsonl", b'{"samples": 1}', "lacks a number for one of samples, loss"),
        ("metrics.jsonl", b"[]", "lacks a number"),
        ("metrics.jsonl", b"\xff\xfe", "cannot be read"),
        ("metrics.jsonl", METRICS_LINE % b"NaN", "NaN is no number of JSON"),
        ("metrics.jsonl", METRICS_LINE % b"1e400", "1e400 is too large"),
        ("metrics.jsonl", METRICS_LINE % (5000 * b"9"), "a number of 5000 digits"),
        ("metrics.jsonl", METRICS_LINE % b"true", "lacks a number"),
        ("metrics.jsonl", METRICS_LINE % b'"1"', "lacks a number"),
        ("metrics.jsonl", METRICS_LINE % b"1e300", "lacks a number"),
        ("metrics.jsonl", METRICS_LINE % (100_000 * b"["), "nested deeper"),
        ("metrics.jsonl", METRICS_LINE % b'1, "loss": 2', "'loss' is given twice"),
        ("scores.jsonl", b'{"samples": 64, "fid": 3}', "lacks a number for one of samples, n"),
        ("scores.jsonl", b'{"samples": -64, "n": 3}', "lacks a number"),
        ("scores.jsonl", b'{"samples": 64.5, "n": 3}', "lacks a number"),
    ],
)
def test_a_damaged_line_is_shown_and_the_rest_drawn(tmp_path, name, line, reason):
    run = write_bare(tmp_path / "run")
    with (run / "scores.jsonl").open("ab") as file:
        file.write(line + b"\n" if name == "scores.jsonl" else b"")
        file.write(b'{"samples": 640, "n": 8, "fid": 17.25}\n')
    if name == "metrics.jsonl":
        whole = (run / name).read_bytes()
        (run / name).write_bytes(line + b"\n" + whole)
    text = words(write(run))
    left_out = re.search(r"Damaged, and left out: (\w+\.jsonl) line 1 (.*?)\. ", text)
    assert left_out is not None and left_out[1] == name and reason in left_out[2]
    assert "2,560 of 6,400" in text and "17.25" in text and "torn" not in text


def test_many_damaged_lines_are_counted(tmp_path):
    run = write_bare(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(1000 * "damage\n")
    text = words(write(run))
    assert "line 45 cannot" in text and "line 46" not in text and "; and 994 more" in text


ROW = {"level": "op", "name": "a", "ok": True, "max_error": 0.5, "max_budget": "inf"}
ROW |= {"rms_error": "nan", "rms_budget": 1}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rows": 3}, "rows is 3, not a list"),
        ({"rows": [3]}, "rows[0] is 3, not an object"),
        ({"rows": [{**ROW, "level": "sofa"}]}, "rows[0].level is 'sofa', not one of block, grad"),
        ({"rows": [{**ROW, "max_error": "big"}]}, "rows[0].max_error is 'big', not a number or"),
        ({"rows": [ROW, {**ROW, "ok": 1}]}, "rows[1].ok is 1, not true or false"),
        ({"rows": [{"level": "op"}]}, "rows[0] lacks 'name'"),
        ({"levels": {}}, "levels is {}, not a list"),
    ],
)
def test_a_parity_record_of_other_types(tmp_path, changes, sentence):
    run = write_bare(tmp_path / "run", model={"implementation": "fast"})
    record = {"levels": ["op"], "rows": [ROW], "device": 5, "code": None}
    (run / "parity.json").write_text(json.dumps(record))
    assert "green: 1 comparisons" in words(write(run))
    (run / "parity.json").write_text(json.dumps({**record, **changes}))
    with pytest.raises(UserError) as error:
        write_report(run)
    assert "parity.json: is no parity record" in str(error.value)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_files_of_the_report_that_are_no_files(tmp_path):
    run = write_bare(tmp_path / "run")
    for name in ("kernels.json", "metrics.jsonl", "samples/samples_0000000640.png"):
        path = run / name
        path.parent.mkdir(exist_ok=True)
        kept = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True)
        os.mkfifo(path)
        with pytest.raises(UserError, match=rf"{path.name}: cannot be read \(it is a FIFO\)"):
            write_report(run)
        path.unlink()
        path.symlink_to(path.name)
        with pytest.raises(UserError, match=rf"{path.name}: cannot be read .*symbolic links"):
            write_report(run)
        path.unlink()
        if kept is not None:
            path.write_bytes(kept)
