"""The training loop, and the state that a checkpoint holds."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sd_perf.config import Config
from sd_perf.data.batch import Batch, Loader, Replacement
from sd_perf.distributed.checkpoints import CheckpointStore, load_tensors, read_state
from sd_perf.distributed.world import World
from sd_perf.errors import CheckpointError, DataError, UserError
from sd_perf.training.callbacks.base import Callback
from sd_perf.training.optimizer import optimizer_tensors, set_step_count
from sd_perf.training.step import TextEncoder, TrainStep


class Trainer:
    """One run: `fit` takes steps from `samples` to `total_samples`. Position is counted in samples."""

    def __init__(
        self,
        config: Config,
        world: World,
        unet: torch.nn.Module,
        loader: Loader,
        text_encoder: TextEncoder | None,
        callbacks: list[Callback],
    ) -> None:
        if config.training.seed is None:
            raise ValueError("the config's seed must be settled (sd_perf.training.run_folder.open_run)")
        self.config = config
        self.world = world
        self.seed = config.training.seed
        self.folder = Path(config.run.dir)
        self.store = CheckpointStore(self.folder / "checkpoints", config.checkpoint.keep)
        self.loader = loader
        self.callbacks = callbacks
        self.unet = unet
        self.step = TrainStep(unet, config, self.seed, world, text_encoder)
        self.total_samples = config.steps_of(config.training.max_samples) * config.training.global_batch_size
        self.samples = 0
        self.bad_samples = 0
        self._new_bad_samples: list[Replacement] = []
        self.stop_reason: str | None = None
        self.loss = torch.zeros(())
        self._data_seconds = 0.0

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
        try:
            for callback in self.callbacks:
                callback.on_start(self)
            window_start, window_samples = time.monotonic(), self.samples
            while not self.is_over:
                self.loss, replacements = self.step(self._timed(batches), self.steps)
                self.samples += self.config.training.global_batch_size
                self._new_bad_samples += replacements
                if self.steps % self.config.logging.every_steps == 0 or self.samples >= self.total_samples:
                    self._log(window_start, window_samples)
                    window_start, window_samples = time.monotonic(), self.samples
                for callback in self.callbacks:
                    callback.on_step(self)
            for callback in self.callbacks:
                callback.on_end(self)
        finally:
            close = getattr(batches, "close", None)
            if close:
                close()
            for callback in self.callbacks:
                callback.close(self)
        return self.stop_reason

    def check(self) -> float:
        """Mean loss of the last step over all ranks, called by all of them.

        UserError where it is not a number, DataError where bad samples are more than the config allows.
        """
        self._count_bad_samples()
        loss = self.world.sum([self.loss.item()])[0] / self.world.size
        if not math.isfinite(loss):
            raise UserError(
                f"loss is {loss} after {self.samples:,} samples; this state was not saved, the newest checkpoint is "
                f"{self.store.newest()}; lower optimizer.base_learning_rate or set training.precision to fp32"
            )
        return loss

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the training state by its checkpoint name; the tensors themselves."""
        model = {f"model.{name}": parameter.data for name, parameter in self.unet.named_parameters()}
        return model | optimizer_tensors(self.unet, self.step.optimizer)

    def state(self) -> dict[str, Any]:
        """The rest of the training state, as `state.json` has it."""
        return {
            "samples": self.samples,
            "steps": self.steps,
            "seed": self.seed,
            "bad_samples": self.bad_samples,
            "dataset": {"samples": self.loader.num_samples, "fingerprint": self.loader.fingerprint},
        }

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of this run, written at any world size."""
        state = read_state(path)
        dataset = self.state()["dataset"]
        if state["dataset"] != dataset:
            raise CheckpointError(f"{path}: was trained on other data ({state['dataset']}, here {dataset})")
        load_tensors(path, self.tensors())
        set_step_count(self.step.optimizer, state["steps"])
        self.samples, self.bad_samples = state["samples"], state["bad_samples"]

    def _log(self, window_start: float, window_samples: int) -> None:
        loss = self.check()
        seconds = time.monotonic() - window_start
        metrics = {
            "samples": self.samples,
            "loss": loss,
            "lr": self.step.optimizer.param_groups[0]["lr"],
            "samples_per_second": (self.samples - window_samples) / seconds,
            "data_wait": self._data_seconds / seconds,
        }
        self._data_seconds = 0.0
        for callback in self.callbacks:
            callback.on_log(self, metrics)

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            start = time.monotonic()
            batch = next(batches)
            self._data_seconds += time.monotonic() - start
            yield batch

    def _count_bad_samples(self) -> None:
        everywhere = [bad for rank in self.world.gather(self._new_bad_samples) for bad in rank]
        self._new_bad_samples = []
        self.bad_samples += len(everywhere)
        if self.world.is_main and everywhere:
            with (self.folder / "bad_samples.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(vars(bad)) + "\n" for bad in everywhere)
        if self.bad_samples > self.config.data.max_bad_samples:
            raise DataError(
                f"{self.bad_samples} bad samples, more than data.max_bad_samples "
                f"({self.config.data.max_bad_samples}); the last: {everywhere[-1].key}: {everywhere[-1].reason}"
            )
