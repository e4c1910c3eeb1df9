"""Every kernel of the training step, traced from the trainer's own code without a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import triton

from sd_kernels.launch import recording
from sd_kernels.targets import GPU, named
from sd_perf.config import Config
from sd_perf.distributed.world import World
from sd_perf.fast.architecture import architecture
from sd_perf.fast.choice import choose_kernels
from sd_perf.fast.ops import Ops
from sd_perf.fast.unet import FastUNet
from sd_perf.tools.estimate.ledger_causes import cause, is_own, rows
from sd_perf.tools.estimate.ledger_recorder import (
    PHASES,
    Entry,
    FakeGPU,
    Recorder,
)
from sd_perf.training.iteration import Iteration


@contextmanager
def _compiled() -> Iterator[None]:
    """Outputs as on a GPU, where Triton's interpreter would have them in float32."""
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = False
        yield


def ledger(config: Config, gpu: str, batch: int) -> dict[str, Any]:
    """The traced step, as JSON takes it: phases, operators beside the floor, causes, kernels.

    Bytes and launches are those of one step of `batch` samples. Raises WaitingError where the step
    waits for the GPU, ConfigError where a kernel cannot be had.
    """
    entries = trace(config, named(gpu), batch)
    summary = rows(entries, architecture(config), batch)
    phases = {phase: _sum(entry for entry in entries if entry.phase == phase) for phase in PHASES}
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        key = entry.phase, entry.op, entry.kernel, "" if is_own(entry) else cause(entry)
        groups.setdefault(key, []).append(entry)
    names = "phase", "op", "kernel", "cause"
    kernels = [dict(zip(names, key, strict=True)) | _sum(group) for key, group in groups.items()]
    total = _sum(entries)
    return {
        **total,
        "gigabytes_per_sample": (total["read"] + total["written"]) / batch / 1e9,
        "phases": phases,
        **summary,
        "kernels": sorted(kernels, key=lambda row: -row["read"] - row["written"]),
    }


def _sum(entries: Iterable[Entry]) -> dict[str, float]:
    """Launches, bytes read and bytes written of all entries together."""
    total = {"launches": 0, "read": 0.0, "written": 0.0}
    for entry in entries:
        total["launches"] += entry.moved.launches
        total["read"] += entry.moved.read
        total["written"] += entry.moved.written
    return total


def trace(config: Config, gpu: GPU, batch: int) -> list[Entry]:
    """The kernels of one training step of the fast network in bfloat16 on the GPU, in order."""
    for _, _, key in config.precision.in_fp8():
        right = "bf16, since the ledger traces a step in bfloat16"
        config.precision.require(False, key, right)
    config = replace(
        config,
        model=replace(config.model, implementation="fast", compile=False),
        training=replace(
            config.training, precision="bf16", global_batch_size=batch, accumulate_steps=1
        ),
    )
    with _compiled(), recording() as launches, FakeGPU():
        recorder = Recorder(launches)
        iteration = _iteration(config, gpu, recorder)
        with recorder.step():
            iteration()
    return recorder.entries


def _iteration(config: Config, gpu: GPU, recorder: Recorder) -> Iteration:
    """The trainer's own iteration, without memory, on the kernels chosen for the GPU."""
    ops = Ops.chosen(choose_kernels(config, gpu.target), recorder.owned)
    with torch.device("cuda"):  # initial weights of 866 million numbers would take minutes
        unet = FastUNet(config.model, ops, config.precision)
    # A world on a GPU would make streams. Tensors on meta say that they are on a GPU all the same.
    world = World(rank=0, size=1, device=torch.device("meta"))
    return Iteration(config, unet, seed=0, world=world, ops=ops)
