"""Jobs of a real Slurm, submitted by the project's own script."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sd_perf.runs.checkpoints import CheckpointStore, load_component
from tests.slurm.conftest import write_preset
from tests.small_run import train_here
from tests.waiting import PATIENCE

NODES = 2


def weights(run: Path, samples: int) -> dict[str, torch.Tensor]:
    newest = CheckpointStore(run / "checkpoints").newest()
    assert newest is not None and newest.name == f"samples_{samples:010d}"
    return load_component(newest, "model")


def require_equal(ours: dict, theirs: dict, tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[key], rtol=tolerance, atol=tolerance, msg=key)


@pytest.fixture(scope="module")
def preset(world: Path) -> Path:
    return write_preset(world, "unscored", evaluation={"prompts": ""})


@pytest.fixture(scope="module")
def never_stopped(preset: Path, world: Path) -> dict[str, torch.Tensor]:
    """The weights of one process that nothing stopped."""
    train_here(preset, world / "never_stopped")
    return weights(world / "never_stopped", 640)


def test_two_nodes_end_equal_to_one_process(sbatch, preset, never_stopped):
    job = sbatch(preset, "--num-nodes", NODES)
    job.wait()
    assert "pre-flight: nodes fit: 2, processes: 2" in job.log
    assert "RESULT,stable_diffusion," in job.log
    require_equal(weights(job.run, 640), never_stopped, 1e-5)


def test_a_signal_saves_and_requeues(sbatch, preset, never_stopped):
    """The signal is the one that sbatch --signal sends before the time limit, to the tasks."""
    job = sbatch(preset, "--num-nodes", NODES)
    job.wait_for_step(192)
    job.cluster.call("scancel", "--signal=USR1", job.number)
    job.wait()
    starts = json.loads((job.run / "run_manifest.json").read_text())["starts"]
    assert len(starts) == 2 and job.cluster.field(job.number, "Restarts") == "1"
    assert "stopped and saved at" in job.log and "resuming at sample" in job.log
    require_equal(weights(job.run, 640), never_stopped, 1e-5)


def test_a_killed_node_loses_nothing(sbatch, preset, never_stopped):
    job = sbatch(preset, "--num-nodes", 1, "--gpus-per-node", 2)
    job.wait_for_step(192)
    node = job.cluster.field(job.number, "NodeList")
    job.cluster.kill_node(node)
    job.wait()
    assert job.cluster.field(job.number, "NodeList") != node
    assert "resuming at sample 160 of 640" in job.log
    require_equal(weights(job.run, 640), never_stopped, 1e-5)
    job.cluster.start_node(node)
    job.cluster.wait(lambda: job.cluster.states() == {"idle"}, "the node is back", PATIENCE)


def test_nodes_that_die_before_a_checkpoint(sbatch, preset, never_stopped):
    """Twice, on either node, which is no want of progress."""
    job = sbatch(preset, "--num-nodes", 1, "--gpus-per-node", 2)
    for position in (32, 96):
        job.wait_for_step(position)
        node = job.cluster.field(job.number, "NodeList")
        restarts = job.cluster.field(job.number, "Restarts")
        job.cluster.kill_node(node)
        elsewhere = lambda: job.cluster.field(job.number, "Restarts") != restarts  # noqa: E731, B023
        job.cluster.wait(elsewhere, f"the job is requeued\n{job.log}", PATIENCE)
        job.cluster.start_node(node)
    job.wait()
    require_equal(weights(job.run, 640), never_stopped, 1e-5)
    job.cluster.wait(lambda: job.cluster.states() == {"idle"}, "the nodes are back", PATIENCE)


def test_an_evaluation_whose_node_dies_goes_on(sbatch, world):
    job = sbatch(write_preset(world, "scored", training={"max_samples": 160}), "--num-nodes", 1)
    job.wait()
    state = lambda: job.cluster.field(job.evaluation, "JobState")  # noqa: E731
    job.cluster.wait(lambda: state() == "RUNNING", "evaluation has begun", PATIENCE)
    node = job.cluster.field(job.evaluation, "NodeList")
    job.cluster.kill_node(node)
    job.cluster.wait(lambda: state() != "RUNNING", "the node is missed", PATIENCE)
    job.cluster.start_node(node)
    ended = lambda: state() in ("COMPLETED", "FAILED")  # noqa: E731
    job.cluster.wait(ended, "evaluation has ended", PATIENCE)
    assert state() == "COMPLETED"
    [scores] = (job.run / "scores.jsonl").read_text().splitlines()
    assert json.loads(scores)["samples"] == 160
    job.cluster.wait(lambda: job.cluster.states() == {"idle"}, "the nodes are back", PATIENCE)


def test_a_job_that_has_ended_goes_on_by_hand(sbatch, preset, never_stopped):
    job = sbatch(preset, "--num-nodes", NODES, "--requeue-limit", 0)
    job.wait_for_step(192)
    job.cluster.call("scancel", "--signal=USR1", job.number)
    job.wait("FAILED")
    assert "slurm/sbatch.sh --resume with the run's folder goes on with it" in job.log
    again = sbatch(preset, "--num-nodes", 1, "--gpus-per-node", 2, "--resume", job.run)
    again.wait()
    assert again.run == job.run and "resuming at sample" in again.log
    require_equal(weights(job.run, 640), never_stopped, 1e-5)


def test_a_run_that_cannot_be_is_not_requeued(sbatch, world):
    preset = write_preset(world, "odd", training={"global_batch_size": 15})
    job = sbatch(preset, "--num-nodes", NODES)
    job.wait("FAILED")
    assert job.cluster.field(job.number, "ExitCode") == "2:0"
    assert "training.global_batch_size: 15" in job.log
    assert "failed with exit code 2; not requeued" in job.log
    dropped = lambda: not job.cluster.call("squeue", "-h")  # noqa: E731
    job.cluster.wait(dropped, "evaluation is dropped", PATIENCE)


def test_pre_flight_names_the_node_without_data(sbatch, world):
    preset = write_preset(world, "hidden", data={"path": f"{world}/only_n1"})
    job = sbatch(preset, "--num-nodes", NODES)
    job.wait("FAILED")
    assert job.cluster.field(job.number, "ExitCode") == "2:0"
    assert f"sd-perf: pre-flight: n2 is unfit ({world}/only_n1: an empty folder)" in job.log
    assert "--exclude n2" in job.log and "STARTING TIMING RUN" not in job.log
    excluded = sbatch(preset, "--num-nodes", 1, "--exclude", "n1")
    excluded.cluster.call("scancel", excluded.number)
    assert excluded.cluster.field(excluded.number, "ExcNodeList") == "n1"


def test_an_unfit_node_is_left_out_when_requeued(sbatch, world):
    """n1 has the data and is drained when the job has begun there; n2 has not."""
    unscored = {"data": {"path": f"{world}/only_n1"}, "evaluation": {"prompts": ""}}
    job = sbatch(write_preset(world, "moved", **unscored), "--num-nodes", 1)
    job.wait_for_step(32)
    assert job.cluster.field(job.number, "NodeList") == "n1"
    job.cluster.call("scontrol", "update", "nodename=n1", "state=drain", "reason=test")
    job.cluster.call("scancel", "--signal=USR1", job.number)
    left_out = lambda: job.cluster.field(job.number, "ExcNodeList") == "n2"  # noqa: E731
    job.cluster.wait(left_out, f"n2 is left out\n{job.log}", PATIENCE)
    job.cluster.call("scontrol", "update", "nodename=n1", "state=resume")
    job.wait()
    assert "requeued to go on without n2" in job.log
    assert job.cluster.field(job.number, "NodeList") == "n1"


def test_the_limit_of_requeues(sbatch, preset):
    job = sbatch(preset, "--num-nodes", NODES, "--requeue-limit", 0)
    job.wait_for_step(32)
    job.cluster.call("scancel", "--signal=USR1", job.number)
    job.wait("FAILED")
    assert job.cluster.field(job.number, "ExitCode") == "75:0"
    assert "not requeued, it was 0 times (--requeue-limit)" in job.log


def test_three_trials_make_a_submission(sbatch, world):
    changes = {
        "training": {"max_samples": 64},
        "mlperf": {"division": "open", "waive": ["parity"], "platform": "two nodes"},
    }
    job = sbatch(write_preset(world, "trials", **changes), "--num-nodes", 1, "--trials", 3)
    done = lambda: not job.cluster.call("squeue", "--noheader")  # noqa: E731
    job.cluster.wait(done, "the queue is empty", 2 * PATIENCE)
    logs = sorted(job.results.glob("results/two_nodes/stable_diffusion/result_*.txt"))
    assert [path.name for path in logs] == ["result_0.txt", "result_1.txt", "result_2.txt"]
    seeds = {
        json.loads(path.read_text())["config"]["training"]["seed"]
        for path in job.results.glob("*_trial_*/run_manifest.json")
    }
    assert seeds == {0, 1, 2}
    log = "".join(path.read_text() for path in (job.results / "logs").iterdir())
    assert log.count("score: none, not converged") == 3
