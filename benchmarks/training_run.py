"""Timed training runs: the trainer that `sd-perf train` builds, its loop, and a stopwatch in it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_environment import Telemetry
from benchmarks.gpu_throughput import FLOPS_PER_SAMPLE
from benchmarks.timing import CudaClock, WallClock, repetitions
from sd_kernels.conv.aten import tuned
from sd_kernels.selection import Choice
from sd_kernels.targets import Target, peak_of_driver
from sd_perf.config import Config, DataConfig, UNetConfig
from sd_perf.distributed.world import World
from sd_perf.errors import ConfigError
from sd_perf.fast.choice import choose_kernels
from sd_perf.presets import config_from_dict, load_preset, parse_value
from sd_perf.tools.results import REPOSITORY, Conditions, Status
from sd_perf.training.callbacks.base import Callback, TrainerView
from sd_perf.training.launch import build_trainer
from sd_perf.training.trainer import Trainer

SOURCES: tuple[str, ...] = typing.get_args(typing.get_type_hints(DataConfig)["format"])
"""where samples can come from: the formats of section `data`"""
BENCHMARK_BATCH, TINY_BATCH = 64, 4
ENDLESS = 10**9
"""samples of a run that a stopwatch ends"""
LEAST_STEPS, MOST_STEPS = 4, 10**6
MOST_WINDOWS = 60
"""points of the curve of rates over a run"""
TINY: dict[str, Any] = {
    "model": {
        "model_channels": 32,
        "channel_mult": [1, 2],
        "num_res_blocks": 1,
        "attention_resolutions": [2],
        "num_head_channels": 32,
        "context_dim": 16,
        "implementation": "fast",
    },
    "data": {"format": "synthetic", "latent_size": 8, "context_tokens": 3},
    "training": {"precision": "fp32", "device": "cpu"},
    "logging": {"every_steps": 2},
}
"""the network of --tiny: it shows that a command works, and no speed"""


class TrainingRow(Conditions):
    """One timed training run. None: not measured, or not known of this machine."""

    implementation: str
    """of the network: plain or fast"""
    source: str
    """where samples come from: a format of section `data`"""
    ranks: int
    accumulate_steps: int
    """micro-batches of an optimizer step on each rank"""
    samples_per_second: float | None
    """over all ranks: samples over time in the second half of the run, stalls included"""
    samples_per_second_per_rank: float | None
    samples_per_second_first_tenth: float | None
    ms_per_iteration: float | None
    """median of the second half"""
    mfu: float | None
    """of a rank: 2.409 TFLOP a sample over the data sheet's dense bf16 peak"""
    data_wait: float | None
    """share of the time after warm-up in which the step waited for its batches"""
    prepare_s: float | None
    """from the choice of kernels to the first step: networks, compilation, capture of the graph"""
    warm_up_s: float | None
    """first step to the end of warm-up"""
    timed_s: float | None
    timed_iterations: int | None
    peak_memory_bytes: int | None
    """of the GPU's tensors after warm-up"""
    sm_clock_mhz: float | None
    power_w: float | None
    temperature_c: float | None
    clock_event_reasons: list[str] | None
    loss_start: float | None
    loss_end: float | None
    """of the first and the last logged step after warm-up"""
    curve: dict[str, list[float]] | None
    """`samples` at the end of each window after warm-up, and its `samples_per_second`"""
    status: Status
    reason: str | None


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Options that choose the config of a run."""
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help="YAML preset (default: the benchmark's UNet)")
    add("--source", choices=SOURCES, default="synthetic", help="samples (default: synthetic)")
    add("--shards", metavar="DIR", help="folder of the shards, but for synthetic")
    add("--batch", type=int, metavar="N", help=f"samples on each rank (default {BENCHMARK_BATCH})")
    help_of_set = "fields of the preset, such as training.precision=fp32 model.implementation=plain"
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help=help_of_set)


def config_of(options: argparse.Namespace, ranks: int) -> Config:
    """The config that the options of `add_config_options` and --tiny choose, for so many ranks.

    ConfigError for what cannot be used.
    """
    if options.config:
        tree = json.loads(json.dumps(dataclasses.asdict(load_preset(options.config))))
    else:
        tree = {section: dict(fields) for section, fields in (TINY if options.tiny else {}).items()}
        tree.setdefault("model", {"implementation": "fast"})
    tree = changed(tree, dict(map(_key_and_value, options.set)))
    data: dict[str, Any] = tree.setdefault("data", {})
    if options.shards and options.source == "synthetic":
        raise ConfigError("--shards: nothing reads them; give the --source that they are, too")
    if options.shards:
        data["path"] = options.shards
    data["format"] = options.source
    training: dict[str, Any] = tree.setdefault("training", {})
    batch = options.batch or (TINY_BATCH if options.tiny else BENCHMARK_BATCH)
    if batch < 1:
        raise ConfigError(f"--batch: {batch} cannot be used; it must be at least 1")
    accumulate = training.get("accumulate_steps", 1)
    training["global_batch_size"] = batch * ranks * accumulate
    training["max_samples"] = ENDLESS
    training["seed"] = training.get("seed") or 0
    return config_from_dict(tree)


def changed(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A nested config with fields changed, which are named as `training.precision`."""
    new = {section: dict(fields) for section, fields in tree.items()}
    for key, value in changes.items():
        section, _, field = key.partition(".")
        new.setdefault(section, {})[field] = value
    return new


def _key_and_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or "." not in key:
        raise ConfigError(f"--set: {text!r} cannot be used; write section.field=value")
    return key, parse_value(value)


Build = Callable[[Config, World, dict[str, Choice], list[Callback]], Trainer]
"""makes a trainer, as `sd_perf.training.launch.build_trainer` does"""


class Stopwatch(Callback):
    """Times the steps of a trainer after a warm-up, and stops it when the time is up.

    Every rank has one. After warm-up the ranks agree once on the number of timed steps.
    """

    def __init__(self, device: torch.device, warm_up_steps: int, seconds: float) -> None:
        self._device, self._warm_up, self._seconds = device, max(2, warm_up_steps), seconds
        self._clock = CudaClock() if device.type == "cuda" else WallClock()
        self._telemetry = Telemetry() if device.type == "cuda" else None
        self._steps = self._last = 0
        self._made, self._started, self._half_warm = time.perf_counter(), 0.0, 0.0
        self.warm_up_s = 0.0
        self.logged: list[dict[str, float]] = []
        """metrics of each logged window that lies wholly after warm-up"""

    def on_start(self, trainer: TrainerView) -> None:
        self._started = time.perf_counter()

    def on_step(self, trainer: TrainerView) -> None:
        self._steps += 1
        if self._steps == self._warm_up // 2:
            self._half_warm = self._now()
        if self._steps < self._warm_up:
            return
        if self._steps == self._warm_up:
            self._begin(trainer)
        self._clock.mark()
        if self._steps == self._last:
            trainer.stop_reason = "measured"

    def _begin(self, trainer: TrainerView) -> None:
        now = self._now()
        each = (now - self._half_warm) / (self._warm_up - self._warm_up // 2)
        # The slowest rank says how many steps all of them take.
        each = trainer.world.max(int(1e6 * each)) / 1e6
        count = repetitions(self._seconds, max(each, 1e-6), least=LEAST_STEPS, most=MOST_STEPS)
        self._last, self.warm_up_s = self._warm_up + count, now - self._started
        if self._telemetry is not None:
            torch.cuda.reset_peak_memory_stats()
            self._telemetry.__enter__()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def on_log(self, trainer: TrainerView, metrics: dict[str, float]) -> None:
        # A log may come some steps after its window, so its own position counts.
        training, window = trainer.config.training, trainer.config.logging.every_steps
        if metrics["samples"] >= (self._warm_up + window) * training.global_batch_size:
            self.logged.append(dict(metrics))

    def close(self, trainer: TrainerView) -> None:
        if self._telemetry is not None and self._last:
            self._telemetry.__exit__(None, None, None)

    def columns(self, batch: int) -> dict[str, Any]:
        """Columns of a `TrainingRow`, from steps of `batch` samples over all ranks."""
        intervals = self._clock.intervals()
        losses = [metrics["loss"] for metrics in self.logged]
        waits = [metrics["data_wait"] for metrics in self.logged]
        gpu: dict[str, Any] = {}
        if self._telemetry is not None:
            peak = torch.cuda.max_memory_allocated()
            gpu = {"peak_memory_bytes": peak, **self._telemetry.summary()}
        return {
            **settled(intervals, batch),
            "data_wait": statistics.mean(waits) if waits else None,
            "prepare_s": self._started - self._made,
            "warm_up_s": self.warm_up_s,
            "timed_s": sum(intervals) / 1000,
            "timed_iterations": len(intervals),
            "loss_start": losses[0] if losses else None,
            "loss_end": losses[-1] if losses else None,
            **gpu,
        }


def settled(intervals: list[float], batch: int) -> dict[str, Any]:
    """Rates of steps of `batch` samples from their milliseconds, and the curve over the run.

    The rate is that of the second half, since clocks sink while a chip warms up. It counts all of
    the time, as a training run does; the milliseconds of an iteration are the median.
    """
    half = intervals[len(intervals) // 2 :]
    first = intervals[: max(1, len(intervals) // 10)]
    size = -(-len(intervals) // MOST_WINDOWS)
    windows = [intervals[i : i + size] for i in range(0, len(intervals), size)]
    counts = itertools.accumulate(len(window) for window in windows)
    return {
        "samples_per_second": rate(half, batch),
        "samples_per_second_first_tenth": rate(first, batch),
        "ms_per_iteration": statistics.median(half),
        "curve": {
            "samples": [batch * count for count in counts],
            "samples_per_second": [round(rate(window, batch), 3) for window in windows],
        },
    }


def rate(intervals: list[float], batch: int) -> float:
    """Samples per second of steps of `batch` samples, from their milliseconds."""
    return 1000 * batch * len(intervals) / sum(intervals)


def timed_run(
    config: Config,
    world: World,
    *,
    warm_up_steps: int,
    seconds: float,
    build: Build = build_trainer,
) -> TrainingRow:
    """Train for about `seconds` after the warm-up; every rank must call it.

    The loop is the trainer's own, with its loader and its log, and no checkpoint.
    """
    with _scratch_run(config) as here:
        watch = Stopwatch(world.device, warm_up_steps, seconds)
        kernels = world.on_main(lambda: choose_kernels(here, Target.here()))
        trainer = build(here, world, kernels, [watch])
        exact = here.training.deterministic
        with contextlib.nullcontext() if exact else tuned(algorithms=10):
            trainer.fit()
    columns = watch.columns(here.training.global_batch_size)
    own = columns["samples_per_second"] / world.size
    return make_row(
        config,
        world.size,
        {**columns, "samples_per_second_per_rank": own, "mfu": mfu(config, own, world.device)},
    )


@contextlib.contextmanager
def _scratch_run(config: Config) -> Iterator[Config]:
    """The config with a run folder that is removed afterwards; bad samples are listed there."""
    with tempfile.TemporaryDirectory(prefix="sd_perf_benchmark_") as folder:
        yield dataclasses.replace(config, run=dataclasses.replace(config.run, dir=folder))


def make_row(config: Config, ranks: int, measured: dict[str, Any]) -> TrainingRow:
    """A row from the measured columns, or from `status` and `reason`."""
    columns: dict[str, Any] = {
        **dict.fromkeys(TrainingRow.__annotations__),
        **conditions(config, ranks),
        "implementation": config.model.implementation,
        "source": config.data.format,
        "ranks": ranks,
        "accumulate_steps": config.training.accumulate_steps,
        "status": "measured",
        **measured,
    }
    return TrainingRow(**columns)  # type: ignore[typeddict-item]


def conditions(config: Config, ranks: int) -> Conditions:
    """Batch on each rank, number format, and what the loop does not compute."""
    in_fp8 = sorted({arithmetic for _, arithmetic, _ in config.precision.in_fp8()})
    text = config.data.format == "synthetic" or config.data.context == "precomputed"
    return {
        "batch": config.micro_batch_size(ranks),
        "dtype": ", ".join([config.training.precision, *in_fp8]),
        "cached": "moments, text states" if text else "moments",
    }


def mfu(config: Config, samples_per_second: float, device: torch.device) -> float | None:
    """Model FLOP/s of the benchmark's UNet over the GPU's dense bf16 peak.

    None for another network, a CPU, or a GPU that `sd_kernels.targets` does not know.
    """
    full = config.model.network == UNetConfig() and config.data.latent_size == 64
    if device.type != "cuda" or not full:
        return None
    peak = peak_of_driver(torch.cuda.get_device_name(device))
    return samples_per_second * FLOPS_PER_SAMPLE / peak.value if peak else None


def preset(name: str) -> Config:
    """A preset of configs/ by its file name."""
    return load_preset(REPOSITORY / "configs" / name)
