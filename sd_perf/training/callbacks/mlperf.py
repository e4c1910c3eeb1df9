"""Writes the training part of the run's MLPerf log; evaluation appends the rest."""

from __future__ import annotations

import time

import torch

from sd_perf.config import Config
from sd_perf.mlperf.log import LOG_NAME, MLPerfLog, import_mlperf
from sd_perf.training.callbacks.base import Callback, TrainerView


class MLPerfLogger(Callback):
    """The log's `init_start` is the time at which this object is made. The main rank writes.

    A block of the log lasts from one checkpoint to the next. A run that is asked to stop leaves its
    block open, and the resumed run closes it, so that the time between the two processes counts.

    init_stop and run_start are written before the first step. What is done but once, such as
    compiling kernels and trying convolution algorithms, comes before them, on synthetic batches, as
    the rules allow (`TrainStep.prepare`).
    """

    def __init__(self, config: Config) -> None:
        import_mlperf("mllog")  # a missing package should be told now
        self._init_ms = time.time_ns() // 1_000_000
        self._cadence = config.steps_of(config.checkpoint.every_samples)
        self._log: MLPerfLog | None = None

    def on_start(self, trainer: TrainerView) -> None:
        # The other ranks wait for this hook, so that none reads data before the run has started.
        if trainer.world.is_main:
            self._log = MLPerfLog(trainer.folder / LOG_NAME, trainer.config)
            self._log.start_init(self._init_ms)
            self._log.describe(trainer.seed, trainer.loader.num_samples)
            self._log.start_run()
            self._log.start_block(trainer.samples)

    def on_step(self, trainer: TrainerView) -> None:
        if trainer.steps % self._cadence == 0 or trainer.samples >= trainer.total_samples:
            trainer.world.on_main(lambda: self._end_block(trainer))

    def _end_block(self, trainer: TrainerView) -> None:
        assert self._log is not None
        memory = None
        if trainer.world.device.type == "cuda":
            # A block ends when its last update is done, not when it is queued
            torch.cuda.synchronize()
            memory = torch.cuda.max_memory_allocated() / 1e9
        self._log.stop_block(trainer.samples, max_memory=memory)
        if trainer.samples < trainer.total_samples:
            self._log.start_block(trainer.samples)
