"""The fast network's iteration: fixed tensors in and out, and no question to the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sd_perf.errors import UserError
from sd_perf.training.callbacks.base import Callback
from sd_perf.training.callbacks.checkpointer import Checkpointer
from sd_perf.training.callbacks.metrics import MetricsFile
from sd_perf.training.fast_step import FastStep
from sd_perf.training.iteration import Iteration

FAST = {"implementation": "fast"}


class Seen(TorchDispatchMode):
    """Counts operators by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def fast_step(trainer) -> FastStep:
    assert isinstance(trainer.step, FastStep)
    return trainer.step


DELAYED = {"linear": "fp8_native", "fp8_recipe": "delayed"}


@pytest.mark.parametrize(("accumulate", "precision"), [(1, {}), (2, {}), (1, DELAYED)])
def test_it_never_asks_the_host(accumulate, precision, make_config, make_trainer):
    training = {"precision": "bf16", "accumulate_steps": accumulate}
    # Training options that compute in the iteration: see docs/training_options.md.
    options = {"ema_decay": 0.9, "min_snr_gamma": 5.0} if accumulate > 1 else {}
    config = make_config(
        model=FAST,
        training=training | options,
        precision=precision,
        diffusion={"offset_noise": 0.1 if options else 0.0},
    )
    trainer = make_trainer(config)
    iteration = fast_step(trainer).iteration
    iteration()
    with Seen() as seen:
        iteration()
    synchronising = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "masked_select")
    assert not [name for name in seen.names if any(word in name for word in synchronising)]
    assert "aten._local_scalar_dense.default" in _names_of(lambda: iteration.loss.item())


def _names_of(call) -> list[str]:
    with Seen() as seen:
        call()
    return seen.names


@pytest.mark.slow
def test_inputs_and_state_stay_where_they_are(make_config, make_trainer):
    trainer = make_trainer(
        make_config(model=FAST, training={"accumulate_steps": 2, "ema_decay": 0.9})
    )
    step = fast_step(trainer)

    def addresses() -> list[int]:
        iteration = step.iteration
        inputs = [t for each in iteration.batches.inputs for t in vars(each).values()]
        optimizer = iteration.optimizer
        state = [iteration.flat.weights, iteration.flat.grads, optimizer.exp_avg, iteration.loss]
        numbers = [optimizer.learning_rate, optimizer.step_number]
        assert iteration.ema is not None
        numbers += [iteration.ema.average, iteration.ema.rate]
        parameters = list(step.unet.parameters())
        return [t.data_ptr() for t in (*inputs, *state, *numbers, *parameters)]

    before = addresses()
    trainer.fit()
    assert addresses() == before


def test_weights_are_split_and_checkpoints_hold_masters(make_config, make_trainer):
    trainer = make_trainer(make_config(model=FAST, training={"precision": "bf16"}))
    assert {p.dtype for p in trainer.unet.parameters()} == {torch.bfloat16}
    before = {name: tensor.clone() for name, tensor in trainer.step.state().items()}
    assert {tensor.dtype for tensor in before.values()} == {torch.float32}
    trainer.fit()
    moved = trainer.step.state()
    for name, parameter in trainer.unet.named_parameters():
        master = moved[f"model.{name}"]
        torch.testing.assert_close(parameter.float(), master, rtol=2**-8, atol=0)
        assert not torch.equal(master, master.bfloat16().float()) or not master.any()
    assert any(not torch.equal(moved[name], before[name]) for name in before)


def test_a_parameter_without_a_gradient_is_an_error(make_config, make_trainer):
    """Its bucket would never be exchanged, and AdamW would take the gradients of the last step."""
    trainer = make_trainer(make_config(model=FAST))
    iteration = fast_step(trainer).iteration
    iteration()
    time_embed = trainer.unet.time_embed[0].weight
    time_embed.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"time_embed\.0\.weight has no gradient"):
        iteration()


class Spoil(Callback):
    """Makes the loss infinite at one step, and finite again after it."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.kept: Iteration | None = None

    def before_step(self, trainer) -> None:
        diffusion = trainer.step.iteration.diffusion
        if trainer.steps == self.step:
            self.loss = diffusion.v_mse_loss
            diffusion.v_mse_loss = lambda *given: self.loss(*given) + float("inf")
        elif trainer.steps == self.step + 1:
            diffusion.v_mse_loss = self.loss


def test_a_loss_that_was_once_infinite_ends_the_run_unsaved(make_config, make_trainer):
    """The step is not a logged one, and the loss of the logged ones is finite."""
    config = make_config(model=FAST, logging={"every_steps": 5}, checkpoint={"every_samples": 4})
    trainer = make_trainer(config, [Spoil(6), MetricsFile(), Checkpointer()])
    with pytest.raises(UserError, match=r"loss is not finite after 28 samples; this state was not"):
        trainer.fit()
    assert trainer.store.newest().name == "samples_0000000024"


class Log(Callback):
    """Position at which a step's metrics came, their own position, and their loss."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, float]] = []

    def on_log(self, trainer, metrics) -> None:
        self.seen.append((trainer.samples, metrics["samples"], metrics["loss"]))


@pytest.mark.slow
def test_a_late_loss_is_logged_with_its_own_step(make_config, make_trainer, monkeypatch):
    """As on a GPU: read two steps later, at the end at once, and before a checkpoint."""
    training, checkpoint = {"max_samples": 48}, {"every_samples": 24}
    changes, logs = {"model": FAST, "training": training, "checkpoint": checkpoint}, []
    for late in (0, 2):
        monkeypatch.setattr("sd_perf.training.trainer.late_steps", lambda device, late=late: late)
        log = Log()
        make_trainer(make_config(f"late{late}", **changes), [log, Checkpointer()]).fit()
        logs.append(log.seen)
    now, later = logs
    assert [entry[1:] for entry in now] == [entry[1:] for entry in later]
    assert [samples for samples, *_ in now] == [20, 40, 48]
    # Step 5 waits for step 6, where a checkpoint needs the loss; step 10 for step 12, the last.
    assert [samples for samples, *_ in later] == [24, 48, 48]
