"""RCP test and score: ten logs of ours and published ones, against the official tools' numbers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from sd_perf.errors import DataError
from sd_perf.mlperf.compliance import check_log
from sd_perf.mlperf.convergence_points import check_rcp
from sd_perf.mlperf.results import logs_of, one_set, read_results
from sd_perf.mlperf.score import score_runs, seed_faults
from tests.mlperf.conftest import change

pytest.importorskip("mlperf_logging")

PUBLISHED = "mlperf_logs/v5.0/NVIDIA/results/nyx_n1_ngc25.04_nemo/stable_diffusion"


def results_in(folder: Path, ruleset: str | None = None):
    return read_results(one_set([folder]), ruleset)


def test_faster_than_the_reference_is_scaled(ten_logs):
    results, ruleset = results_in(ten_logs())
    verdict = check_rcp(results, ruleset)
    assert ruleset == "5.0.0" and verdict.passed
    assert verdict.mean == 1_984_000 and verdict.factor == pytest.approx(1.0255550900712191)
    assert verdict.reference.mean == pytest.approx(2_034_701.2987)
    assert verdict.reference.least == pytest.approx(1_850_814.1931)
    assert verdict.reference.origin == "interpolated between those of batches 256 and 2,048"
    score = score_runs(results, ruleset)
    assert score.minutes[:3] == pytest.approx((30.0, 30.0, 40.0)) and score.dropped == (0, 9)
    assert score.mean == pytest.approx((30 + 7 * 40) / 8)
    assert score.scaled == pytest.approx(score.mean * verdict.factor)
    assert score.rate == pytest.approx(51_200 / 60, rel=1e-3) and score.faults() == []
    assert not any(path.name == "scaling.json" for path in results[0].path.parent.iterdir())


def test_much_faster_than_the_reference_fails(ten_logs):
    results, ruleset = results_in(ten_logs([1_536_000] * 10))
    verdict = check_rcp(results, ruleset)
    assert not verdict.passed and "1,536,000 is below the smallest mean allowed" in verdict.words
    score = score_runs(results, ruleset)
    assert any("the RCP test fails" in fault for fault in score.faults())


def test_one_run_that_did_not_converge_is_the_slowest(ten_logs):
    folder = ten_logs()
    change(folder / "result_4.txt", '"status": "success"', '"status": "aborted"')
    results, ruleset = results_in(folder)
    assert results[4].samples is None and check_rcp(results, ruleset).mean == 2_048_000
    change(folder / "result_5.txt", '"status": "success"', '"status": "aborted"')
    verdict = check_rcp(results_in(folder)[0], ruleset)
    assert not verdict.passed and "2 runs did not converge" in verdict.words


def test_seeds(ten_logs):
    folder = ten_logs()
    change(folder / "result_3.txt", '"value": 4, "metadata"', '"value": 5, "metadata"')
    change(folder / "result_7.txt", '"key": "seed"', '"key": "sd_perf_seed"')
    results, _ = results_in(folder)
    assert seed_faults(results) == [
        "result_7.txt has no seed; log it before init_stop",
        "seed 5 is that of result_3.txt and result_4.txt; every run draws its own",
    ]


@pytest.mark.parametrize(
    ("was", "now", "words"),
    [
        ('"run_stop"', '"other"', r"result_0\.txt: has no run_stop, so the run is not over"),
        ('"status": "success"', '"state": 1', "run_stop has no status success or aborted"),
        ('"value": 80.0', '"value": 90.5', "says success, and no evaluation passes FID 90"),
        ('"key": "global_batch_size"', '"key": "other"', "has no global_batch_size; log a whole"),
        ('"key": "global_batch_size", "value": 512', '"key": "global_batch_size", "value": 0', "0"),
        ('"global_batch_size", "value": 512', '"global_batch_size", "value": 256', "batch sizes"),
        ('"value": "closed"', '"value": "open"', r"different divisions: open .* a submission has"),
        (', "metric": "CLIP"', ', "metric": "clip"', "without CLIP; log both metrics"),
        ('{"namespace"', '{"names', r"result_0\.txt: line 1 is damaged"),
        ('"value": 80.0', '"value": "80"', r"line \d+: FID is '80', not a number"),
    ],
)
def test_logs_that_no_tool_can_take(ten_logs, was, now, words):
    folder = ten_logs()
    change(folder / "result_0.txt", was, now)
    with pytest.raises(DataError, match=words):
        results_in(folder)


def test_too_few_and_the_wrong_ones(ten_logs, tmp_path):
    folder = ten_logs()
    two, ruleset = read_results([folder / "result_0.txt", folder / "result_1.txt"])
    with pytest.raises(DataError, match=r"2 runs: .* needs three runs at least"):
        check_rcp(two, ruleset)
    with pytest.raises(DataError, match=r"2 runs: .* so a score needs three at least"):
        score_runs(two, ruleset)
    with pytest.raises(DataError, match="is given twice"):
        logs_of([folder, folder / "result_3.txt"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no such MLPerf log \(result_\*\.txt\)"):
        logs_of([tmp_path / "empty"])
    with pytest.raises(DataError, match=r"ruleset 6\.1\.0: the installed mlperf-logging has no"):
        results_in(folder, "6.1.0")
    for name in ("one", "other"):
        shutil.copytree(folder, tmp_path / "both" / name)
    with pytest.raises(DataError, match="these are logs of 2 folders"):
        one_set([tmp_path / "both"])


def test_run_folders_are_a_set(ten_logs, tmp_path):
    folder = ten_logs()
    runs = tmp_path / "runs"
    for number in range(3):
        (runs / f"trial_{number}").mkdir(parents=True)
        shutil.copy(folder / f"result_{number}.txt", runs / f"trial_{number}" / "result_0.txt")
    results, _ = results_in(runs)
    assert [result.name for result in results] == [f"trial_{n}/result_0.txt" for n in range(3)]


def test_a_batch_above_all_references(ten_logs, closed):
    config = closed(training={"global_batch_size": 4096})
    verdict = check_rcp(*results_in(ten_logs(config=config)))
    assert verdict.reference is None and not verdict.passed
    assert "there is no reference for batch 4,096 or larger" in verdict.words


def test_the_commands(ten_logs, sd_perf):
    folder = ten_logs()
    code, out, _ = sd_perf("mlperf", "rcp", folder)
    assert code == 0 and "1,984,000 samples" in out and "multiplied by 1.025555" in out
    code, out, _ = sd_perf("mlperf", "score", folder, "--gpus", "8", "--gpu", "h100")
    assert code == 0 and "39.740260 minutes" in out and "dropped: slowest" in out
    assert "106.7 samples/s of each of 8" in out and "26.0 % of 989 TFLOP/s" in out
    code, out, _ = sd_perf("mlperf", "score", *sorted(folder.glob("*"))[:4])
    assert code == 1 and "these are 4 runs; a submission has 10" in out
    for command in ("check", "rcp", "score"):
        code, _, errors = sd_perf("mlperf", command)
        assert code == 2 and "no run is named" in errors
    code, _, errors = sd_perf("mlperf", "score", folder, "--gpu", "h100")
    assert code == 2 and "add --gpus" in errors


def test_published_runs_of_nvidia(real_data):
    """The numbers of the official tools for ten logs of round v5.0."""
    results, ruleset = results_in(real_data / PUBLISHED)
    assert ruleset == "5.0.0"
    verdict = check_rcp(results, ruleset)
    assert verdict.passed and verdict.mean == 1_856_000 and verdict.factor == 1
    assert verdict.reference.mean == pytest.approx(1_706_666.6667)
    assert verdict.reference.least == pytest.approx(1_529_130.7745)
    score = score_runs(results, ruleset)
    assert score.mean == score.scaled == pytest.approx(14.07643125)
    expected = "11.635 11.6525 11.6585 11.6641 15.4701 15.4798 15.5197 15.5439 15.6229 15.7056"
    assert " ".join(f"{m:.4f}".rstrip("0") for m in sorted(score.minutes)) == expected
    assert score.faults() == []


def test_published_logs_deserve_no_note(real_data):
    for log in logs_of([real_data / PUBLISHED]):
        assert check_log(log).notes == ()


def test_published_runs_of_other_rounds(real_data):
    results, ruleset = results_in(real_data / "mlperf_logs/v4.0/NVIDIA")
    verdict = check_rcp(results, ruleset)
    assert ruleset == "4.0.0" and verdict.passed and verdict.mean == 2_560_000
    assert read_results(logs_of([real_data / "mlperf_logs/v3.1"]))[1] == "3.1.0"
    with pytest.raises(DataError, match=r"several rounds: .*name --ruleset"):
        read_results(logs_of([real_data / "mlperf_logs"]))
