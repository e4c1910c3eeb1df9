"""A run stopped at any step and resumed is the run that never stopped; so is one on more
processes."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

from sd_perf.runs.checkpoint_files import read_state
from sd_perf.runs.checkpoints import CheckpointStore, load_component
from sd_perf.training.callbacks.base import Callback
from sd_perf.training.callbacks.checkpointer import Checkpointer
from sd_perf.training.callbacks.metrics import MetricsFile
from sd_perf.training.callbacks.signals import StopOnSignal
from tests.small_run import small_config, small_trainer, start_train, train
from tests.waiting import PATIENCE, wait_for

LENGTH = {"max_samples": 80}
"""20 steps, with checkpoints after 40 and 80 samples"""
ENDLESS = ("--training.max-samples", "100000", "--logging.every-steps", "1")


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, trainer) -> None:
        if trainer.steps == self.step:
            trainer.stop_reason = "test"


def final_tensors(run: Path) -> dict[str, torch.Tensor]:
    newest = CheckpointStore(run / "checkpoints").newest()
    assert newest is not None
    return {
        part + name: tensor
        for part in ("model", "exp_avg", "exp_avg_sq", *_average(newest))
        for name, tensor in load_component(newest, part).items()
    }


def _average(checkpoint: Path) -> tuple[str, ...]:
    """The component of the moving average, where the checkpoint has one."""
    return ("ema",) * any(name.startswith("ema.") for name in read_state(checkpoint)["tensors"])


def assert_bit_identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def relative_error(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest |a - b| / |b| (Euclidean norms) over the weight tensors."""
    weights = [name for name in a if name.startswith(("model", "ema")) and b[name].any()]
    return max(((a[name] - b[name]).norm() / b[name].norm()).item() for name in weights)


@pytest.fixture(scope="module")
def whole_folder(tmp_path_factory) -> Path:
    """A run that never stopped, trained once."""
    config = small_config(tmp_path_factory.mktemp("whole") / "run", training=LENGTH)
    trainer = small_trainer(config, [MetricsFile(), Checkpointer()])
    trainer.fit()
    return trainer.folder


@pytest.fixture
def whole_run(whole_folder) -> dict[str, torch.Tensor]:
    return final_tensors(whole_folder)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("stop", [1, 10, 13, 19])
def test_resumed_run_is_bit_identical(stop, make_config, make_trainer, whole_run, whole_folder):
    config = make_config("stopped", training=LENGTH)
    first = make_trainer(config, [StopAt(stop), MetricsFile(), Checkpointer()])
    assert first.fit() == "test" and first.steps == stop
    second = make_trainer(config, [MetricsFile(), Checkpointer()], resume=True)
    assert second.samples == 4 * stop
    assert second.fit() is None
    assert_bit_identical(final_tensors(second.folder), whole_run)
    # The metrics file, too, is the one of a run that never stopped.
    logs = [
        (run / "metrics.jsonl").read_text().splitlines() for run in (second.folder, whole_folder)
    ]
    stopped, whole = (
        [{k: json.loads(line)[k] for k in ("samples", "loss", "lr")} for line in log]
        for log in logs
    )
    assert stopped == whole


@pytest.mark.slow
def test_a_decay_does_not_move_when_the_run_is_made_longer(make_config, make_trainer):
    optimizer = {"warmup_steps": 2, "decay_steps": 6}
    long = make_config("long", optimizer=optimizer, training={"max_samples": 32})
    whole = make_trainer(long, [Checkpointer()])
    whole.fit()
    for samples in (16, 32):
        config = make_config("longer", optimizer=optimizer, training={"max_samples": samples})
        trainer = make_trainer(config, [Checkpointer()], resume=samples > 16)
        trainer.fit()
    assert_bit_identical(final_tensors(trainer.folder), final_tensors(whole.folder))


def stopped_and_resumed(
    make_config, make_trainer, implementations: list[str]
) -> dict[str, torch.Tensor]:
    """The end of a run stopped at step 10, begun with the first implementation of the UNet and
    ended with the last."""
    for stop, implementation in zip((10, 20), implementations, strict=True):
        model = {"implementation": implementation}
        config = make_config("-".join(implementations), model=model, training=LENGTH)
        trainer = make_trainer(config, [StopAt(stop), Checkpointer()], resume=stop > 10)
        trainer.fit()
    return final_tensors(trainer.folder)


def test_a_run_of_the_fast_unet_resumes_bit_identically(make_config, make_trainer):
    config = make_config("whole", model={"implementation": "fast"}, training=LENGTH)
    whole = make_trainer(config, [Checkpointer()])
    whole.fit()
    assert_bit_identical(
        stopped_and_resumed(make_config, make_trainer, ["fast", "fast"]),
        final_tensors(whole.folder),
    )


@pytest.mark.sampled(1)
@pytest.mark.parametrize("implementations", [["fast", "plain"], ["plain", "fast"]], ids="-".join)
def test_checkpoints_pass_between_implementations(
    implementations, make_config, make_trainer, whole_run
):
    error = relative_error(
        stopped_and_resumed(make_config, make_trainer, implementations), whole_run
    )
    print(f"{implementations} against plain, 20 steps: largest relative error {error:.1e}")
    assert 0 < error < 1e-5


@pytest.mark.slow
def test_lines_after_the_checkpoint_are_set_aside(make_config, make_trainer, tmp_path):
    config = make_config("run")
    make_trainer(config, [StopAt(10), MetricsFile(), Checkpointer()]).fit()
    path = tmp_path / "run" / "metrics.jsonl"
    kept = path.read_text()
    later = json.dumps({"samples": 60, "loss": 1.0})
    path.write_text(
        kept + later + "\n" + later[:7]
    )  # steps after the checkpoint, and a torn last line
    trainer = make_trainer(config, [StopAt(11), MetricsFile()], resume=True)
    trainer.fit()
    assert path.read_text() == kept
    assert later in (tmp_path / "run" / "metrics.superseded.jsonl").read_text()


@pytest.mark.slow
def test_accumulation_changes_rounding_only(make_config, make_trainer, whole_run):
    config = make_config("accumulated", training={**LENGTH, "accumulate_steps": 2})
    trainer = make_trainer(config, [Checkpointer()])
    trainer.fit()
    assert relative_error(final_tensors(trainer.folder), whole_run) < 1e-5


@pytest.mark.slow
def test_two_processes_equal_one_and_resume_across(
    preset, tmp_path, whole_run, whole_folder, sd_perf
):
    """20 steps on two gloo processes; and the last 10 of them on one."""
    samples = ("--training.max-samples", str(LENGTH["max_samples"]))
    train(preset, tmp_path / "two", *samples, processes=2)
    two = final_tensors(tmp_path / "two")
    error = relative_error(two, whole_run)
    print(f"two processes against one, 20 steps: largest relative error {error:.1e}")
    assert error < 1e-5
    losses = [
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (tmp_path / "two", whole_folder)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)

    shutil.copytree(tmp_path / "two", tmp_path / "across")
    shutil.rmtree(tmp_path / "across" / "checkpoints" / "samples_0000000080")
    command = ("train", "--config", preset, "--run.dir", tmp_path / "across", "--resume")
    code, output, errors = sd_perf(*command, *samples)
    assert code == 0 and "resuming at sample 40 of 80" in output, errors
    assert relative_error(final_tensors(tmp_path / "across"), whole_run) < 1e-5


class SignalAt(Callback):
    def __init__(self, step: int, number: signal.Signals) -> None:
        self.step, self.number = step, number

    def on_step(self, trainer) -> None:
        if trainer.steps == self.step:
            signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signal_saves_and_stops(number, make_config, make_trainer):
    handler = signal.getsignal(number)
    callbacks = [SignalAt(3, number), StopOnSignal(), Checkpointer()]
    trainer = make_trainer(make_config(), callbacks)
    assert trainer.fit() == number.name and trainer.steps == 3
    assert trainer.store.newest().name == "samples_0000000012"
    assert signal.getsignal(number) is handler


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_signal_saves_and_leaves(number, preset, tmp_path, sd_perf):
    run = tmp_path / "run"
    process = start_train(preset, run, *ENDLESS)
    wait_for(lambda: logged_steps(run) > 1)
    process.send_signal(number)
    if number == signal.SIGTERM:  # schedulers repeat it
        wait_for(lambda: process.poll() is not None or process.send_signal(number))
    output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75 and "saving after this step" in errors, errors
    assert number.name in output and "--resume" in output
    newest = CheckpointStore(run / "checkpoints").newest()
    assert newest is not None
    samples = int(newest.name.removeprefix("samples_"))
    command = ("train", "--config", preset, "--run.dir", run, "--resume")
    code, output, errors = sd_perf(*command, "--training.max-samples", samples + 8)
    assert code == 0, errors
    assert f"resuming at sample {samples:,}" in output


@pytest.mark.slow
def test_signal_to_one_rank_stops_both(preset, tmp_path):
    run = tmp_path / "run"
    process = start_train(preset, run, *ENDLESS, processes=2)
    wait_for(lambda: logged_steps(run) > 1)
    process.send_signal(signal.SIGTERM)  # torchrun hands it to its workers, at different moments
    output, errors = process.communicate(timeout=PATIENCE)
    assert "stopped by SIGTERM and saved" in output, errors
    assert CheckpointStore(run / "checkpoints").newest() is not None


def logged_steps(run: Path) -> int:
    """Lines of the run's metrics."""
    path = run / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0
