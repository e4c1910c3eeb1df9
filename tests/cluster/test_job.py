"""What follows the end of a start of a job."""

from __future__ import annotations

from pathlib import Path

import pytest

from sd_perf.cluster import job as job_module
from sd_perf.cluster.commands import Training
from sd_perf.cluster.job import (
    JobRun,
    conclude_job,
    decide,
    exit_code,
    run_job,
    scored,
)
from sd_perf.cluster.timed_run import position

SRUN = "srun: error: n1: task 0: Exited with exit code 76"


@pytest.mark.parametrize("code", [1, 2, 130])
def test_a_failure_is_not_requeued(code):
    again, words = decide(code, 0, 10, True, "at 500 samples")
    assert not again and words == f"failed with exit code {code}; not requeued"


@pytest.mark.parametrize("code", [75, 76, 137])
def test_what_was_interrupted_is_requeued(code):
    again, words = decide(code, 0, 10, True, "at 500 samples")
    assert again and words.endswith("at 500 samples; to be requeued")


@pytest.mark.parametrize(("code", "advised"), [(75, False), (76, True), (137, True)])
def test_the_limit(code, advised):
    again, words = decide(code, 10, 10, True, "at 500 samples")
    assert not again and "it was 10 times (--requeue-limit)" in words
    assert ("find what kills it" in words) == advised and "--resume" in words


def test_a_stop_without_progress_after_a_requeue_is_final():
    assert decide(75, 0, 10, False, "at 0 samples")[0]
    again, words = decide(75, 1, 10, False, "at 500 samples")
    assert not again and "saved nothing new since it was last requeued" in words
    assert "more --walltime" in words and "--resume" in words


@pytest.mark.parametrize("code", [76, 137])
def test_a_loss_is_requeued_without_progress(code):
    assert decide(code, 9, 10, False, "at 500 samples")[0]


@pytest.mark.parametrize(
    ("code", "codes", "ended"),
    [(0, [], 0), (75, [75, 75], 75), (76, [1, 76], 1), (76, [76, 2], 2), (137, [76], 137)],
)
def test_one_code_of_many_tasks(code, codes, ended):
    assert exit_code(code, codes) == ended


def test_what_srun_says_of_its_tasks():
    codes: list[int] = []
    listen = job_module._collector(codes)
    for line in (SRUN, "srun: error: n1: tasks 0-3,7: Exited with exit code 2", f"echo {SRUN}"):
        listen(line)
    assert codes == [76, 2]


def test_the_newest_checkpoint_by_name(tmp_path):
    assert position(tmp_path) == 0
    for name in ("samples_0000000040", "samples_0000000200", ".writing_samples_0000000400.x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert position(tmp_path) == 200


class Slurm:
    """Steps that end with given codes, in place of srun."""

    def __init__(self, monkeypatch, codes: list[int], unfit: list[str]) -> None:
        self.modules: list[str] = []
        self.requeued: list[str] = []
        self.codes = codes

        def step(job: JobRun, module: str, *arguments: str, alone: bool = False) -> int:
            self.modules.append(arguments[1] if arguments[0] == "cluster" else arguments[0])
            return self.codes.pop(0)

        def requeue(number: str, exclude: str = "") -> int:
            self.requeued.append(exclude)
            return 75

        found = {"caches_cleared": False, "unfit": unfit}
        monkeypatch.setattr(job_module, "_step", step)
        monkeypatch.setattr(job_module, "_requeue", requeue)
        monkeypatch.setattr(job_module, "read_json", lambda path: found)
        monkeypatch.setenv("SLURM_JOB_ID", "1")


def small_job(folder: Path, needs_proof: bool = False) -> JobRun:
    training = Training(folder / "tiny.yaml", folder / "run", needs_proof=needs_proof)
    return JobRun(training, 0, 10, "", "")


def test_the_steps_of_a_start(tmp_path, monkeypatch, capsys):
    slurm = Slurm(monkeypatch, [0, 0, 0], [])
    assert run_job(small_job(tmp_path, needs_proof=True)) == 0
    assert slurm.modules == ["preflight", "prove", "train"] and not slurm.requeued
    output = capsys.readouterr().out
    assert output.index("STARTING TIMING RUN AT") < output.index("RESULT,stable_diffusion,0,")


def test_an_unfit_node_ends_a_first_start(tmp_path, monkeypatch):
    slurm = Slurm(monkeypatch, [2], ["n2"])
    assert run_job(small_job(tmp_path)) == 2
    assert slurm.modules == ["preflight"] and not slurm.requeued


def test_an_unfit_node_is_excluded_from_a_later_start(tmp_path, monkeypatch):
    slurm = Slurm(monkeypatch, [2], ["n2", "n3"])
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run_job(small_job(tmp_path))
    assert slurm.requeued == ["n2,n3"]


def test_a_signal_in_pre_flight_is_a_stop(tmp_path, monkeypatch):
    slurm = Slurm(monkeypatch, [75], [])
    run_job(small_job(tmp_path))
    assert slurm.requeued == [""]


def test_nothing_is_begun_over_the_limit(tmp_path, monkeypatch, capsys):
    """Slurm itself requeues a job whose node failed, however often that was."""
    slurm = Slurm(monkeypatch, [], [])
    monkeypatch.setenv("SLURM_RESTART_COUNT", "11")
    assert run_job(small_job(tmp_path)) == conclude_job(small_job(tmp_path), None) == 76
    assert not slurm.modules and "requeued it 11 times, over --requeue-limit" in (
        capsys.readouterr().out
    )


def test_an_evaluation_that_lost_its_node_is_requeued(tmp_path, monkeypatch):
    slurm = Slurm(monkeypatch, [137, 1], [])
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    conclude_job(small_job(tmp_path), None)
    assert slurm.requeued == [""]
    assert conclude_job(small_job(tmp_path), None) == 1
    assert slurm.requeued == [""]


def test_an_evaluation_that_is_stopped_must_have_kept_something(tmp_path, monkeypatch, capsys):
    slurm = Slurm(monkeypatch, [75, 75], [])
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert conclude_job(small_job(tmp_path), None) == 75
    assert not slurm.requeued and "more --walltime" in capsys.readouterr().out
    kept = tmp_path / "run/evaluation/samples_0000000008/pictures_00000000.safetensors"
    step = job_module._step

    def keeps(*arguments: object, **options: object) -> int:
        kept.parent.mkdir(parents=True)
        kept.touch()
        return step(*arguments, **options)

    monkeypatch.setattr(job_module, "_step", keeps)
    conclude_job(small_job(tmp_path), None)
    assert slurm.requeued == [""]


def test_how_far_an_evaluation_is(tmp_path):
    assert scored(tmp_path) == (0, 0)
    kept = tmp_path / "evaluation/samples_0000000016"
    kept.mkdir(parents=True)
    (kept / "pictures_00000000.safetensors").touch()
    assert scored(tmp_path) == (0, 1)
    (tmp_path / "scores.jsonl").write_text("{}\n")
    assert scored(tmp_path) > (0, 1)


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ("TIMEOUT", "it had not saved when its time was over; give it a longer --signal-lead"),
        ("COMPLETING", "requeues it by itself where a node has failed"),
        ("PENDING", "Slurm requeues it by itself"),
        ("CANCELLED", "job 1 is CANCELLED; not requeued"),
    ],
)
def test_a_job_that_slurm_has_ended_is_left_alone(state, told, monkeypatch, capsys):
    monkeypatch.setattr(job_module, "job_field", lambda number, name: state)
    monkeypatch.setattr(job_module, "call", lambda *words: pytest.fail(str(words)))
    assert job_module._requeue("1") == 75
    assert told in capsys.readouterr().out


def test_each_task_of_an_array_has_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    job = JobRun(Training(tmp_path / "a.yaml", tmp_path / "run", seed=7), 0, 1, "", "")
    mine = job_module._of_trial(job).training
    assert (mine.folder.name, mine.seed) == ("run_trial_3", 10)


def test_scontrol_is_told_the_task_of_an_array(monkeypatch):
    """The last task has the array's own number: to requeue that would requeue every task."""
    for name, value in {"JOB_ID": "7", "ARRAY_JOB_ID": "7", "ARRAY_TASK_ID": "3"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert job_module._job_id() == "7_3"


def test_a_job_over_its_time_is_told_so_while_slurm_ends_it(monkeypatch, capsys):
    fields = {"JobState": "COMPLETING", "Reason": "TimeLimit"}
    monkeypatch.setattr(job_module, "job_field", lambda number, name: fields[name])
    assert job_module._requeue("1") == 75
    assert "give it a longer --signal-lead" in capsys.readouterr().out
