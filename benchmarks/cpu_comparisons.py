"""Training on a CPU beside its rivals: the step, and the time from start to first step.

    python -m benchmarks.cpu_comparisons [--threads 1] [--turns 25] [--output FILE.json]

Sides run in turns in the same run, and what counts is their ratio. On one thread steps and UNets
are timed in CPU seconds, which other work on the machine does not add to; all else by the wall.
Network, batch and inputs have the sizes of configs/smoke.yaml, except that all norms have the
transformers' number of groups, which is all that diffusers can express.

- step: the trainer's step (draws, forward, backward, AdamW) with the fast network, beside
  diffusers' UNet with torch's fused AdamW (`benchmarks.diffusers_training`) and beside the
  trainer's own plain network.
- UNet: forward and backward alone, the plain network and diffusers' with the same weights.
- start: a process of `sd-perf train` that takes one step on synthetic data, checkpoint and run
  folder included, beside one of the rival that imports diffusers and takes one.

Needs diffusers.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.command import Report, python_path, run_command
from benchmarks.diffusers_training import build, comparable, training_step
from benchmarks.pairs import in_turns, pair_row
from benchmarks.training_run import TINY, preset
from sd_perf.config import Config
from sd_perf.data.batch import Batch
from sd_perf.distributed.world import World
from sd_perf.errors import UserError
from sd_perf.models.build import build_unet, choose_ops
from sd_perf.models.key_maps import to_diffusers
from sd_perf.presets import config_from_dict
from sd_perf.reference.unet import UNet
from sd_perf.tools.results import REPOSITORY, Conditions
from sd_perf.training.build_step import build_step

NAME = "cpu_comparisons"
PARTS = ("step", "unet", "start")
STEPS, WARM_UP_TURNS, START_TURNS = 2, 3, 3
WALL = ("wall", time.perf_counter)
FAST, PLAIN, DIFFUSERS = "fast step", "plain step", "diffusers' UNet, fused AdamW"


def smoke_config(tiny: bool) -> Config:
    """The smoke run's config, or the tiny one, with one number of groups for all norms."""
    if tiny:
        training = {**TINY["training"], "global_batch_size": 2}
        smoke = config_from_dict({**TINY, "training": training})
    else:
        smoke = preset("smoke.yaml")
    model = replace(smoke.model, resblock_groups=smoke.model.transformer_groups)
    return replace(smoke, model=model)


def inputs(config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Random moments (B, 2C, S, S) and context (B, L, D) of the config's batch."""
    torch.manual_seed(0)
    batch, side = config.training.global_batch_size, config.data.latent_size
    moments = torch.randn(batch, 2 * config.model.in_channels, side, side)
    return moments, torch.randn(batch, config.data.context_tokens, config.model.context_dim)


def own_step(config: Config, moments: torch.Tensor, context: torch.Tensor) -> Callable[[], object]:
    """A call that takes one step of the trainer's on these inputs, at the full learning rate.

    At the first rates of the warm-up the layers that start at 0 stay so small that AdamW squares
    their gradients into denormal numbers, on which a CPU is several times slower.
    """
    world = World(rank=0, size=1, device=torch.device("cpu"))
    batch = Batch(torch.arange(len(moments)), moments, [""] * len(moments), context)
    ops = choose_ops(config)
    unet = build_unet(config, seed=0, device=world.device, ops=ops)
    step = build_step(unet, config, seed=0, world=world, text_encoder=None, ops=ops)
    return lambda: step(iter([batch]), config.optimizer.warmup_steps)


def repeated(call: Callable[[], object], count: int) -> Callable[[], None]:
    """A call of `count` calls."""

    def calls() -> None:
        for _ in range(count):
            call()

    return calls


Now = Callable[[], float]


def compare_steps(config: Config, turns: int, now: Now) -> dict[str, list[float]]:
    """Seconds of `STEPS` training steps of each side, by turn."""
    given = inputs(config)
    sides = {
        FAST: own_step(config, *given),
        PLAIN: own_step(replace(config, model=config.model.network), *given),
        DIFFUSERS: training_step(config, *given),
    }
    repeated_sides = {name: repeated(side, STEPS) for name, side in sides.items()}
    return in_turns(repeated_sides, turns, WARM_UP_TURNS, now)


def compare_unets(config: Config, turns: int, now: Now) -> dict[str, list[float]]:
    """Seconds of forward and backward of a batch, with the same weights in both networks."""
    network = comparable(config)
    unet, other = UNet(network), build(network)
    other.load_state_dict(to_diffusers(unet.state_dict(), network))
    moments, context = inputs(config)
    latents = moments[:, : network.in_channels].contiguous()
    timesteps = torch.randint(0, 1000, (len(latents),))

    def ours() -> None:
        unet(latents, timesteps, context).square().mean().backward()

    def theirs() -> None:
        other(latents, timesteps, context).sample.square().mean().backward()

    return in_turns({"plain UNet": ours, "diffusers' UNet": theirs}, turns, WARM_UP_TURNS, now)


def compare_starts(threads: int, turns: int) -> dict[str, list[float]]:
    """Seconds of a process from its start to its end, after one training step."""
    module = [sys.executable, "-m"]
    rival = [*module, "benchmarks.diffusers_training", "--threads", str(threads)]
    settings = {
        "data.format": "synthetic",
        "mlperf.division": "none",
        "training.max-samples": "32",
        "training.cpu-threads": str(threads),
    }
    options = [word for key, value in settings.items() for word in (f"--{key}", value)]
    own = [*module, "sd_perf", "train", "--config", "configs/smoke.yaml", *options]

    def process(command: list[str]) -> None:
        environment = {**os.environ, "PYTHONPATH": python_path()}
        subprocess.run(command, cwd=REPOSITORY, env=environment, check=True, capture_output=True)

    def train() -> None:
        with tempfile.TemporaryDirectory() as folder:
            process([*own, "--run.dir", str(Path(folder) / "run")])

    return in_turns({"sd-perf train": train, "diffusers": lambda: process(rival)}, turns)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The command's own options."""
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    add("--threads", type=int, default=1, metavar="N", help="of CPU arithmetic (default: 1)")
    turns = f"of each side, {STEPS} steps a turn (default: 25)"
    add("--turns", type=int, default=25, metavar="N", help=turns)


def measure(options: argparse.Namespace) -> int:
    """The pairs asked for; returns the exit code."""
    if min(options.threads, options.turns) < 1:
        raise UserError("--threads, --turns: give 1 or more")
    torch.set_num_threads(options.threads)
    config, turns = smoke_config(options.tiny), options.turns
    # Several threads wait for each other, and the CPU seconds of waiting say nothing.
    clock, now = ("CPU", time.process_time) if options.threads == 1 else WALL
    if options.tiny:
        turns = 1
        options.parts = [part for part in options.parts if part != "start"]
    told_by = ("work", "side", "rival")
    report = Report(NAME, options, torch.device("cpu"), told_by, ["diffusers"])
    conditions: Conditions = {
        "batch": config.training.global_batch_size,
        "dtype": "float32",
        "cached": "moments, text states, in memory",
    }

    def add(work: str, seconds: dict[str, list[float]], side: str, rival: str) -> None:
        threads = options.threads
        report.add(pair_row(work, seconds, side, rival, conditions, threads=threads, clock=clock))

    if "step" in options.parts:
        seconds = compare_steps(config, turns, now)
        for side, rival in ((FAST, DIFFUSERS), (PLAIN, DIFFUSERS), (FAST, PLAIN)):
            add(f"training step, {STEPS} of them", seconds, side, rival)
    if "unet" in options.parts:
        seconds = compare_unets(config, turns, now)
        add("UNet, forward and backward", seconds, "plain UNet", "diffusers' UNet")
    if "start" in options.parts:
        clock, conditions["cached"] = WALL[0], "files in the page cache"
        seconds = compare_starts(options.threads, min(turns, START_TURNS))
        add("start of the process to one step", seconds, "sd-perf train", "diffusers")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; returns the exit code."""
    return run_command(NAME, __doc__, add_options, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
