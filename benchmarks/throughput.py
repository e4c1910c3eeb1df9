"""Settled throughput of training: the real trainer, loader and loop, for minutes.

    python -m benchmarks.throughput [--minutes 5] [--batch 64] [--output FILE.json]
    torchrun --nproc-per-node 8 -m benchmarks.throughput --source moments --shards DIR

The rate is that of the second half of the time after warm-up: a GPU's clock sinks for minutes, and
short runs flatter it. Beside it: MFU (2.409 TFLOP a sample), wait for data, clock, power and memory
of GPU 0. No checkpoint is written.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from benchmarks.command import Report, leave, run_command
from benchmarks.training_run import add_config_options, config_of, timed_run
from sd_perf.distributed.world import start_world, stop_world
from sd_perf.errors import UserError

NAME = "throughput"
TOLD_BY = ("implementation", "source", "ranks", "batch")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    add_config_options(parser)
    add = parser.add_argument
    add("--minutes", type=float, default=5.0, help="timed run after warm-up, min (default: 5)")
    add("--warm-up-steps", type=int, default=30, help="steps before the clock starts (default: 30)")


def measure(options: argparse.Namespace) -> int:
    """Time one run; rank 0 reports. Returns the exit code."""
    if not 0 < options.minutes <= 24 * 60:
        raise UserError(f"--minutes: {options.minutes:g} cannot be used; give 0.01 to 1,440")
    # The config says on which device; the ranks are only counted after the world is there.
    world = start_world(config_of(options, ranks=1).training.device)
    try:
        config = config_of(options, world.size)
        report = Report(NAME, options, world.device, TOLD_BY) if world.is_main else None
        row = timed_run(
            config, world, warm_up_steps=options.warm_up_steps, seconds=60 * options.minutes
        )
        if report:
            report.add(row)
    finally:
        stop_world(world)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit code."""
    return run_command(NAME, __doc__, add_options, measure, arguments)


if __name__ == "__main__":
    leave(main())
