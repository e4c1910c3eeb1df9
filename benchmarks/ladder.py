"""The ladder: from a plain float32 step to the whole fast one, one switch a rung.

    python -m benchmarks.ladder [--seconds 20] [--batch 64] [--rungs 1 2 3] [--output FILE.json]

Every rung trains with the real trainer, loader and loop (see `benchmarks.throughput`); each keeps
the switches of the rungs below it. A rung that cannot run here says why and the next one goes on
from it; one that runs out of memory or fails is a row that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attempts import attempt, release_memory
from benchmarks.command import Report, run_command
from benchmarks.training_run import (
    Build,
    TrainingRow,
    add_config_options,
    config_of,
    make_row,
    timed_run,
)
from sd_kernels.selection import Choice
from sd_kernels.targets import Target
from sd_perf.config import Config
from sd_perf.data.loaders.build_loader import build_loader
from sd_perf.distributed.world import World, start_world
from sd_perf.errors import UserError
from sd_perf.fast.ops import Ops
from sd_perf.models.build import build_text_encoder, build_unet
from sd_perf.training.callbacks.base import Callback
from sd_perf.training.launch import build_trainer
from sd_perf.training.plain_step import PlainStep
from sd_perf.training.trainer import Trainer

NAME = "ladder"


@dataclass(frozen=True)
class Rung:
    """A switch that is added to those of the rungs below; see `RUNGS`."""

    name: str
    switch: str
    """what is changed, in words"""
    changes: tuple[tuple[str, Any], ...] = ()
    """fields of the config, as `training.precision`, and their values"""
    channels_last: bool = False
    """convolutions in NHWC memory, from this rung on"""
    cudnn_attention: bool = False
    """torch's attention by cuDNN alone, from this rung on; below it torch's plain matmuls"""
    flat: bool = False
    """the fast network's own step, from this rung on; below it torch's AdamW and autocast"""
    needs: Callable[[Target], str] = lambda target: ""
    """why it cannot run on a target; empty: it can"""


def _needs_cuda(target: Target) -> str:
    return "" if target.device == "cuda" else f"needs a CUDA GPU, this is {target.name}"


def _needs_fp8(target: Target) -> str:
    has_fp8 = target.device == "cuda" and (target.capability or (0, 0)) >= (8, 9)
    return "" if has_fp8 else f"needs a GPU with FP8 (8.9 and later), this is {target.name}"


RUNGS = (
    Rung(
        "plain fp32",
        "torch's layers, float32, attention by matmuls, torch's fused AdamW",
        changes=(
            ("model.implementation", "plain"),
            ("training.precision", "fp32"),
        ),
    ),
    Rung("autocast", "bf16 autocast over float32 weights", (("training.precision", "bf16"),)),
    Rung("channels-last", "convolutions in NHWC memory", channels_last=True),
    Rung(
        "cuDNN attention",
        "torch's attention by cuDNN's fused kernel",
        cudnn_attention=True,
        needs=_needs_cuda,
    ),
    Rung(
        "fused ops",
        "the fast network: the operators of sd_kernels, still under autocast",
        (("model.implementation", "fast"),),
    ),
    Rung(
        "flat AdamW",
        "the fast step without a graph: bf16 weights with float32 masters in flat buffers, one "
        "AdamW kernel, fused draws and loss, no autocast",
        (("training.cuda_graph", "off"),),
        flat=True,
    ),
    Rung(
        "graph",
        "the whole iteration in one CUDA graph",
        (("training.cuda_graph", "auto"),),
        needs=_needs_cuda,
    ),
    Rung(
        "FP8",
        "linear layers of the transformers in FP8 (fp8_native)",
        (("precision.linear", "fp8_native"),),
        needs=_needs_fp8,
    ),
)


class LadderRow(TrainingRow):
    """A rung's timed run."""

    rung: str
    """number and name"""
    switch: str
    ratio: float | None
    """its rate over that of the lowest measured rung"""
    ratio_to_previous: float | None
    """its rate over that of the measured rung before it"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    add_config_options(parser)
    add = parser.add_argument
    numbers = range(1, len(RUNGS) + 1)
    names = ", ".join(f"{number} {rung.name}" for number, rung in enumerate(RUNGS, 1))
    add(
        "--rungs", type=int, nargs="+", choices=numbers, metavar="N", help=f"{names} (default: all)"
    )
    add("--seconds", type=float, default=20.0, help="timed run of each rung, s (default: 20)")
    add("--warm-up-steps", type=int, default=10, help="steps before the clock starts (default: 10)")


def changes_up_to(rung: int) -> list[str]:
    """Fields that rungs 1 to `rung` change, as `--set` takes them."""
    fields = dict(change for each in RUNGS[:rung] for change in each.changes)
    return [f"{key}={value}" for key, value in fields.items()]


def build_plain_step(
    config: Config,
    world: World,
    kernels: dict[str, Choice],
    callbacks: list[Callback],
    *,
    channels_last: bool,
) -> Trainer:
    """A trainer of the config's network, plain or fast, with the plain network's step.

    That step is torch's AdamW and autocast. The memory format is set before the optimizer is made,
    whose moments lie as their parameters do.
    """
    seed = config.training.seed or 0
    ops = Ops.chosen(kernels) if config.model.implementation == "fast" else None
    unet = build_unet(config, seed=seed, device=world.device, ops=ops)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    unet = unet.to(memory_format=layout)  # type: ignore[call-overload]
    text = None
    if config.data.format == "moments" and config.data.context == "open_clip":
        text = build_text_encoder(config, world.device)
    step = PlainStep(unet, config, seed, world, text)
    loader = build_loader(config, seed, world)
    return Trainer(config, world, step=step, loader=loader, callbacks=callbacks)


def time_rung(
    number: int, config: Config, world: World, options: argparse.Namespace
) -> TrainingRow:
    """The timed run of a rung, counted from 1, with the config of `changes_up_to`."""
    below = RUNGS[:number]
    build: Build = build_trainer
    if not any(rung.flat for rung in below):
        build = partial(build_plain_step, channels_last=any(rung.channels_last for rung in below))
    # Kernels of the fast network choose their attention themselves.
    backend = SDPBackend.MATH
    if world.device.type == "cuda" and any(rung.cudnn_attention for rung in below):
        backend = SDPBackend.CUDNN_ATTENTION
    fast = config.model.implementation == "fast"
    with contextlib.nullcontext() if fast else sdpa_kernel(backend):
        return timed_run(
            config,
            world,
            warm_up_steps=options.warm_up_steps,
            seconds=options.seconds,
            build=build,
        )


def measure(options: argparse.Namespace) -> int:
    """Every rung asked for; returns the exit code, 1 where one failed."""
    if not 0 < options.seconds <= 24 * 3600:
        raise UserError(f"--seconds: {options.seconds:g} cannot be used; give 0.1 to 86,400")
    given = list(options.set)
    world = start_world(config_of(options, ranks=1).training.device)
    target = Target("cpu", "cpu") if world.device.type == "cpu" else Target.here()
    report = Report(NAME, options, world.device, ("rung",))
    rates: list[float] = []
    for number in options.rungs or range(1, len(RUNGS) + 1):
        rung = RUNGS[number - 1]
        if against := rung.needs(target):
            # The config of the rung before it says what the others measure.
            options.set = [*given, *changes_up_to(number - 1)]
            row = make_row(config_of(options, 1), 1, {"status": "absent", "reason": against})
        else:
            options.set = [*given, *changes_up_to(number)]
            config = config_of(options, 1)
            measured = attempt(partial(_measured, number, config, world, options))
            row = make_row(config, 1, measured)
            attempt(release_memory)
        rate = row["samples_per_second"]
        compared: dict[str, Any] = {
            "rung": f"{number} {rung.name}",
            "switch": rung.switch,
            "ratio": rate / (rates or [rate])[0] if rate else None,
            "ratio_to_previous": rate / (rates or [rate])[-1] if rate else None,
        }
        rates += [rate] if rate else []
        report.add({**row, **compared})
    return int(any(row["status"] == "failed" for row in report.result.rows))


def _measured(
    number: int, config: Config, world: World, options: argparse.Namespace
) -> dict[str, Any]:
    return dict(time_rung(number, config, world, options))


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit code."""
    return run_command(NAME, __doc__, add_options, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
