"""The training loop, and the state that a checkpoint holds."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sd_perf.config import Config
from sd_perf.data.batch import Batch, Loader, Replacement
from sd_perf.distributed.world import World
from sd_perf.errors import CheckpointError, DataError, UserError
from sd_perf.fast.linear import load_precision_state, precision_state
from sd_perf.files import disk_errors, json_lines, quoted
from sd_perf.runs.checkpoint_files import GO_BACK, read_state
from sd_perf.runs.checkpoints import (
    MAKE_ROOM,
    CheckpointStore,
    load_component,
    load_tensors,
)
from sd_perf.runs.folder import config_digest, read_run_id, require_of_run
from sd_perf.training.callbacks.base import Callback
from sd_perf.training.readings import (
    LateNumber,
    manual_garbage_collection,
    named_range,
)
from sd_perf.training.step import State, TrainStep

_PRECISION = "precision_state."
"""how names of the precision state begin in a checkpoint"""
LATE_STEPS = 2
"""steps after which a logged loss is read on a GPU"""


def late_steps(device: torch.device) -> int:
    """Steps after which a logged loss is read: on a CPU it is there at once."""
    return LATE_STEPS if device.type == "cuda" else 0


@dataclass(frozen=True)
class _Log:
    """The metrics of a logged step whose loss has not been read yet."""

    metrics: dict[str, float]
    loss: LateNumber
    due: int
    """number of steps taken when it is read"""


class Trainer:
    """One run: `fit` takes steps from position `samples` to `total_samples`.

    Positions are counted in samples, as the benchmark counts. On a GPU the loss of a logged step is
    read LATE_STEPS steps later, when it has long been computed, so that reading holds up nothing. A
    loss that is not finite therefore ends the run at most logging.every_steps + LATE_STEPS steps
    after it arose, and before anything is saved.
    """

    def __init__(
        self,
        config: Config,
        world: World,
        step: TrainStep,
        loader: Loader,
        callbacks: list[Callback],
    ) -> None:
        if config.training.seed is None:
            raise ValueError("the config's seed must be settled (sd_perf.runs.folder.open_run)")
        self.config = config
        self.world = world
        self.seed = config.training.seed
        self.folder = Path(config.run.dir)
        writer = (world.rank, world.size) if step.divides_state else (0, 1)
        self.store = CheckpointStore(
            self.folder / "checkpoints", config.checkpoint.keep, writer, world.lost
        )
        self.loader = loader
        self.callbacks = callbacks
        self.step = step
        self.unet = step.unet
        self.total_samples = (
            config.steps_of(config.training.max_samples) * config.training.global_batch_size
        )
        self.samples = 0
        self.bad_samples = 0
        self._new_bad_samples: list[Replacement] = []
        self.stop_reason: str | None = None
        self.loss = torch.zeros(())
        self._data_seconds = 0.0
        self._log_under_way: _Log | None = None
        self._window_start, self._window_samples = 0.0, 0

    @property
    def steps(self) -> int:
        """Optimizer steps taken since sample 0."""
        return self.samples // self.config.training.global_batch_size

    @property
    def is_over(self) -> bool:
        """Whether the step just taken is the last of this process."""
        return self.samples >= self.total_samples or self.stop_reason is not None

    def fit(self) -> str | None:
        """Train to the end, or until asked to stop; returns the reason of a stop."""
        batches = self.loader.batches(self.samples)
        with contextlib.ExitStack() as stack:
            stack.callback(getattr(batches, "close", lambda: None))
            for callback in self.callbacks:
                stack.callback(callback.close, self)
            # Before any callback starts: an MLPerf run begins when all that is done once is done.
            stack.callback(self.step.close)
            self.step.prepare()
            if self.world.is_main or self.step.divides_state:
                self.store.reserve(self._buffers())
            self._each(lambda callback: callback.on_start(self))
            stack.enter_context(manual_garbage_collection())
            self._window_start, self._window_samples = time.monotonic(), self.samples
            while not self.is_over:
                self._take_step(batches)
            self._finish_log()
            self._each(lambda callback: callback.on_end(self))
            self.world.together(self._tell_of_saved)
        return self.stop_reason

    def _take_step(self, batches: Iterator[Batch]) -> None:
        with named_range("data"):
            ready = self.world.together(lambda: self._next_batches(batches))
        for callback in self.callbacks:
            callback.before_step(self)
        with named_range("step"):
            self.loss, replacements = self.step(iter(ready), self.steps)
        self.samples += self.config.training.global_batch_size
        self._new_bad_samples += replacements
        is_logged = self.steps % self.config.logging.every_steps == 0
        if is_logged or self.samples >= self.total_samples:
            self._begin_log()
        if self._log_under_way and self.steps >= self._log_under_way.due:
            self._finish_log()
        for callback in self.callbacks:
            callback.on_step(self)

    def checked_loss(self) -> float:
        """Mean loss of the last step over all ranks, called by all of them.

        UserError where it is not finite, DataError where more samples were bad than the config
        allows. Samples replaced since the last call are written to bad_samples.jsonl.
        """
        self._finish_log()
        return self._checked(self.loss.item())

    def _checked(self, own: float) -> float:
        """The mean over ranks of a loss; see `checked_loss`."""
        replaced = [bad for rank in self.world.gather(self._new_bad_samples) for bad in rank]
        self._new_bad_samples = []
        self.bad_samples += len(replaced)
        loss = self.world.sum([own])[0] / self.world.size
        self.world.on_main(lambda: self._stop_past_limits(loss, replaced))
        return loss

    def weights(self) -> dict[str, torch.Tensor]:
        """The network's weights by name, as it computes with them; called by all ranks."""
        self.step.gather_weights()
        return dict(self.unet.named_parameters())

    def save(self) -> Path:
        """Begin to write a checkpoint, called by all ranks; returns its path.

        UserError where the state has blown up: then nothing is written.
        """
        self.world.on_main(self.store.begin)
        # All ranks look at their state before one begins to write, and waits for the others.
        self.world.together(self._require_finite)
        if self.world.is_main or self.step.divides_state:
            self.store.save(self._buffers(), self.state(), self._named)
        return self.store.path(self.samples)

    def _require_finite(self) -> None:
        # The loss was taken before the update. A norm's squares leave float32 long before the
        # numbers themselves do.
        buffers = self.step.buffers().values()
        numbers = [buffer for buffer in buffers if buffer.is_floating_point()]
        if not torch.nn.utils.get_total_norm(numbers).isfinite():
            raise self._diverged("weights or optimizer moments are")

    def _buffers(self) -> dict[str, torch.Tensor]:
        """What is copied for a checkpoint; the precision state is the main rank's to write."""
        state = precision_state(self.unet) if self.world.is_main else {}
        named = {f"{_PRECISION}{name}": tensor for name, tensor in state.items()}
        return self.step.buffers() | named

    def _named(self, copies: dict[str, torch.Tensor]) -> State:
        scales = {name: copy for name, copy in copies.items() if name.startswith(_PRECISION)}
        return self.step.named(copies) | scales

    def state(self) -> dict[str, Any]:
        """The rest of the training state, as `state.json` has it."""
        return {
            "run_id": read_run_id(self.folder),
            "config_digest": config_digest(self.config),
            "samples": self.samples,
            "steps": self.steps,
            "seed": self.seed,
            "bad_samples": self.bad_samples,
            "dataset": {
                "samples": self.loader.num_samples,
                "fingerprint": self.loader.fingerprint,
                "keys": self.loader.keys_fingerprint,
            },
            "callbacks": {name: state for name, state in self._callback_states() if state},
        }

    def _callback_states(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for callback in self.callbacks:
            yield type(callback).__name__, callback.state_dict()

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of this run, written at any world size."""
        state = read_state(path)
        self._require_continues(path, state)
        self.step.restore(load_tensors(path, self.step.state_shapes()), state["steps"])
        if precision_state(self.unet):
            load_precision_state(self.unet, load_component(path, "precision_state"))
        for callback in self.callbacks:
            if saved := state["callbacks"].get(type(callback).__name__):
                callback.load_state_dict(saved)
        self.samples, self.bad_samples = state["samples"], state["bad_samples"]

    def _require_continues(self, path: Path, state: dict[str, Any]) -> None:
        """CheckpointError where `state` is not a position of this run."""
        require_of_run(path, state, self.folder)
        theirs, mine = self._what_binds(state), self._what_binds(self.state())
        for key, other in (
            ("config_digest", "with another config"),
            ("seed", "with another seed"),
            ("dataset", "on other data"),
        ):
            if theirs[key] != mine[key]:
                was, here = quoted(theirs[key], limit=200), quoted(mine[key], limit=200)
                raise CheckpointError(
                    f"{path}: was trained {other} ({was}, here {here}); resume with the "
                    f"{key.partition('_')[0]} the run was begun with, or choose another --run.dir"
                )
        batch = self.config.training.global_batch_size
        if state["samples"] != state["steps"] * batch:
            raise CheckpointError(
                f"{path}: cannot be used (state.json: {state['samples']} samples are not "
                f"{state['steps']} steps of {batch}); {GO_BACK}"
            )

    def _what_binds(self, state: dict[str, Any]) -> dict[str, Any]:
        """What of a state must be the same where the run goes on."""
        another = self.config.data.resume_in_another_format
        names = ("samples", "keys") if another else ("samples", "fingerprint")
        dataset = {name: value for name, value in state["dataset"].items() if name in names}
        # With another format the config is another; its other keys were compared by `open_run`.
        digest = "" if another else state["config_digest"]
        return {"config_digest": digest, "seed": state["seed"], "dataset": dataset}

    def _begin_log(self) -> None:
        """Take the metrics of the step just taken; its loss is read when it is due."""
        self._finish_log()
        loss, now = LateNumber(self.loss), time.monotonic()
        seconds = now - self._window_start
        metrics = {
            "samples": self.samples,
            "loss": math.nan,
            "lr": self.step.learning_rate(self.steps - 1),
            "samples_per_second": (self.samples - self._window_samples) / seconds,
            "data_wait": self._data_seconds / seconds,
        }
        due = self.steps + late_steps(self.world.device)
        self._log_under_way = _Log(metrics, loss, due)
        self._window_start, self._window_samples, self._data_seconds = now, self.samples, 0.0

    def _finish_log(self) -> None:
        """Hand the metrics of a logged step to the callbacks, where there are any."""
        log, self._log_under_way = self._log_under_way, None
        if log is None:
            return
        with named_range("log"):
            # A step begins when the last rank has its data.
            wait = max(self.world.gather(log.metrics["data_wait"]))
            loss = self._checked(log.loss.value())
            metrics = {**log.metrics, "data_wait": wait, "loss": loss}
            self._each(lambda callback: callback.on_log(self, metrics))
            gc.collect()

    def _each(self, hook: Callable[[Callback], None]) -> None:
        """Call a hook of every callback, in order; where one fails on one rank, all leave."""

        def call() -> None:
            for callback in self.callbacks:
                hook(callback)

        self.world.together(call)

    def _tell_of_saved(self) -> None:
        for path in self.store.take_saved():
            for callback in self.callbacks:
                callback.checkpoint_saved(self, path)

    def _next_batches(self, batches: Iterator[Batch]) -> list[Batch]:
        """The micro-batches of the next step.

        All are read before the step begins, so that ranks can stop together where one has no data.
        For the same reason, failed and finished writes of checkpoints are reported here.
        """
        self.store.raise_failure()
        self._tell_of_saved()
        start = time.monotonic()
        ready = [next(batches) for _ in range(self.config.training.accumulate_steps)]
        self._data_seconds += time.monotonic() - start
        return ready

    def _stop_past_limits(self, loss: float, replaced: list[Replacement]) -> None:
        """Record replaced samples; raise where they are too many or the loss is not finite."""
        path = self.folder / "bad_samples.jsonl"
        if replaced:
            with disk_errors(path, MAKE_ROOM), path.open("a", encoding="utf-8") as file:
                file.write(json_lines(map(vars, replaced)))
        if self.bad_samples > self.config.data.max_bad_samples:
            last = f", the last {replaced[-1].key}: {replaced[-1].reason}" if replaced else ""
            raise DataError(
                f"{self.config.data.path}: {self.bad_samples} bad samples, more than "
                "data.max_bad_samples "
                f"({self.config.data.max_bad_samples}){last}; mend those listed in {path}, or "
                "raise the limit"
            )
        if not math.isfinite(loss):
            raise self._diverged("loss is")

    def _diverged(self, what: str) -> UserError:
        self.store.wait()
        return UserError(
            f"{what} not finite after {self.samples:,} samples; this state was not saved, "
            f"{self.store.newest_in_words()}; begin anew with a lower "
            "optimizer.base_learning_rate, or with "
            f"training.precision fp32"
        )
