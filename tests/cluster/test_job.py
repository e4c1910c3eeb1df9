"""What follows the end of a start of a job."""

from __future__ import annotations

from pathlib import Path

import pytest

from sd_perf.cluster import job as job_module
from sd_perf.cluster.commands import Training
from sd_perf.cluster.job import JobRun, decide, exit_code, position, run_job

SRUN = "srun: error: n1: task 0: Exited with exit code 76"


@pytest.mark.parametrize("code", [1, 2, 130])
def test_a_failure_is_not_requeued(code):
    again, words = decide(code, 0, 10, 0, 500)
    assert not again and f"failed with exit code {code}" in words


@pytest.mark.parametrize("code", [75, 76, 137])
def test_what_was_interrupted_is_requeued(code):
    again, words = decide(code, 0, 10, 0, 500)
    assert again and words.endswith("at 500 samples; to be requeued")


def test_the_limit():
    again, words = decide(75, 10, 10, 0, 500)
    assert not again and "it was 10 times" in words


def test_no_progress_between_two_requeues():
    assert decide(75, 0, 10, 0, 0)[0]
    again, words = decide(75, 1, 10, 500, 500)
    assert not again and "no checkpoint since it was last requeued" in words


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


def test_each_task_of_an_array_has_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    job = JobRun(Training(tmp_path / "a.yaml", tmp_path / "run", seed=7), 0, 1, "", "")
    mine = job_module._of_trial(job).training
    assert (mine.folder.name, mine.seed) == ("run_trial_3", 10)
