"""The state of the run as a file for Prometheus' node exporter (its textfile collector)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from sd_perf.files import disk_errors
from sd_perf.optional import optional
from sd_perf.training.callbacks.base import Callback, TrainerView

_GAUGES = {
    "training": "1 while the run trains, 0 after it has left",
    "updated_timestamp_seconds": "Unix time at which this file was written",
    "samples": "position of the run, samples",
    "total_samples": "length of the run, samples",
    "loss": "mean loss over all ranks of the last logged step",
    "learning_rate": "learning rate of the last logged step",
    "samples_per_second": "samples per second since the step logged before",
    "data_wait_ratio": "part of the time spent waiting for data",
    "gpu_memory_bytes": "memory that tensors of rank 0 have taken at most",
    "checkpoint_timestamp_seconds": "Unix time at which the newest checkpoint was complete",
    "checkpoint_age_seconds": "age of the newest checkpoint when this file was written",
}
"""names, after sd_perf_, and meanings"""
_FROM_METRICS = {
    "samples": "samples",
    "loss": "loss",
    "lr": "learning_rate",
    "samples_per_second": "samples_per_second",
    "data_wait": "data_wait_ratio",
}


class PrometheusFile(Callback):
    """Written by the main rank at each logged step, whole: the exporter never reads a half."""

    def __init__(self, path: Path) -> None:
        need = "logging.prometheus needs its client"
        self._library: Any = optional("prometheus_client", need, "prometheus")
        self._path = path
        self._registry = self._library.CollectorRegistry()
        self._values: dict[str, float] = {}
        self._gauges: dict[str, Any] = {}

    def on_start(self, trainer: TrainerView) -> None:
        self._values = {"samples": trainer.samples, "total_samples": trainer.total_samples}
        if newest := trainer.store.newest():
            self._values["checkpoint_timestamp_seconds"] = newest.stat().st_mtime
        self._write(trainer, is_training=True)

    def on_log(self, trainer: TrainerView, metrics: dict[str, float]) -> None:
        self._values |= {name: metrics[key] for key, name in _FROM_METRICS.items()}
        if trainer.world.device.type == "cuda":
            self._values["gpu_memory_bytes"] = torch.cuda.max_memory_allocated()
        self._write(trainer, is_training=True)

    def checkpoint_saved(self, trainer: TrainerView, path: Path) -> None:
        self._values["checkpoint_timestamp_seconds"] = time.time()

    def close(self, trainer: TrainerView) -> None:
        if self._values:
            self._write(trainer, is_training=False)

    def _write(self, trainer: TrainerView, is_training: bool) -> None:
        if not trainer.world.is_main:
            return
        now = time.time()
        values = {"training": int(is_training), "updated_timestamp_seconds": now, **self._values}
        if saved := values.get("checkpoint_timestamp_seconds"):
            values["checkpoint_age_seconds"] = now - saved
        for name, value in values.items():
            if name not in self._gauges:
                gauge = self._library.Gauge(
                    f"sd_perf_{name}", _GAUGES[name], ["run"], registry=self._registry
                )
                self._gauges[name] = gauge.labels(run=str(trainer.folder))
            self._gauges[name].set(value)
        with disk_errors(self._path, "make its folder, or leave logging.prometheus empty"):
            self._library.write_to_textfile(str(self._path), self._registry)
