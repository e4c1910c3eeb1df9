"""Trains a config: chooses kernels, builds every part of the run, and starts the loop."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sd_kernels.conv.aten import tuned
from sd_kernels.selection import Choice
from sd_kernels.spec import Target
from sd_perf.config import Config
from sd_perf.console import TextConsole
from sd_perf.data.augmentation import CaptionDropout
from sd_perf.data.batch import Loader
from sd_perf.data.loaders.build_loader import build_loader
from sd_perf.distributed.world import World
from sd_perf.evaluation.fixed_prompts import FixedPrompts
from sd_perf.fast.choice import choose_kernels, require_used, used_ops
from sd_perf.fast.ops import Ops
from sd_perf.mlperf.rules import require_closed
from sd_perf.models.build import build_encoders, build_text_encoder, build_unet
from sd_perf.models.first_weights import copy_first_weights, first_weights_record
from sd_perf.runs.checkpoints import CheckpointStore
from sd_perf.runs.folder import open_run, read_run_config, settle_run
from sd_perf.runs.lock import RunLock
from sd_perf.runs.parity_record import require_green
from sd_perf.training.build_step import build_step
from sd_perf.training.callbacks.base import Callback
from sd_perf.training.callbacks.checkpointer import Checkpointer
from sd_perf.training.callbacks.data_wait import DataWaitWarning
from sd_perf.training.callbacks.metrics import MetricsFile
from sd_perf.training.callbacks.mlperf import MLPerfLogger
from sd_perf.training.callbacks.profile import ProfileSteps, named_in_profile
from sd_perf.training.callbacks.progress import ProgressDisplay
from sd_perf.training.callbacks.prometheus import PrometheusFile
from sd_perf.training.callbacks.samples import DrawSamples
from sd_perf.training.callbacks.signals import StopOnSignal
from sd_perf.training.callbacks.sinks import SendToSinks
from sd_perf.training.kernels_table import kernels_table
from sd_perf.training.memory import require_step_fits
from sd_perf.training.trainer import Trainer
from sd_perf.visible import visible


def launch(
    config: Config, world: World, *, resume: bool, fresh: bool, console: TextConsole
) -> str | None:
    """Train to the end; returns None, or the reason why the run was asked to stop.

    Kernels are chosen here, once, and handed to network, diffusion step and optimizer. Nothing but
    a lock is written to the run folder before data, weights and checkpoint have been found good.
    Rank 0 holds the lock until training has ended.
    """
    with RunLock() as lock:
        return _launch(config, world, resume=resume, fresh=fresh, console=console, lock=lock)


def _launch(
    config: Config, world: World, *, resume: bool, fresh: bool, console: TextConsole, lock: RunLock
) -> str | None:
    folder = Path(config.run.dir)
    if resume or fresh:
        world.on_main(lambda: lock.take(folder) if folder.is_dir() else None)
    world.on_main(lambda: require_allowed(config))
    target = Target.here()
    choices = world.on_main(lambda: choose_kernels(config, target))
    parity = world.on_main(lambda: _parity_record(config, console))
    world.on_main(lambda: require_step_fits(config, world))
    settled = world.on_main(lambda: _settle(config, resume, fresh, console))
    torch.use_deterministic_algorithms(settled.training.deterministic)
    # With it torch fills every new tensor with NaN: passes over memory that change no result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if settled.training.cpu_threads is not None:
        torch.set_num_threads(settled.training.cpu_threads)
    pictures = world.together(lambda: _pictures(settled, world))
    callbacks = default_callbacks(config, console, pictures)
    checkpoints = CheckpointStore(Path(settled.run.dir) / "checkpoints")
    newest = world.on_main(checkpoints.newest) if resume else None
    begins = newest is None
    trainer = build_trainer(settled, world, choices, callbacks, begins)
    if newest is not None:
        world.together(lambda: trainer.load(newest))
    elif resume:
        console.print(f"{visible(trainer.folder)}: no checkpoint to resume from", soft_wrap=True)
    if trainer.samples >= trainer.total_samples:
        told = f"{visible(trainer.folder)}: the run is complete ({trainer.samples:,} samples)"
        console.print(
            f"{told}; to train on, resume it with a larger --training.max-samples", soft_wrap=True
        )
        return None
    kernels = {op: dataclasses.asdict(choices[op]) for op in used_ops(config)}
    if kernels:
        console.print(*kernels_table(target.name, kernels), sep="\n")
    records = {"kernels.json": list(kernels.values()), "parity.json": parity}
    if settled.model.init and begins:
        records["init.json"] = world.on_main(lambda: first_weights_record(settled))
        console.print(f"begins from {visible(settled.model.init)}", soft_wrap=True)
    world.on_main(lambda: open_run(settled, resume=resume, fresh=fresh, records=records, lock=lock))
    # Convolutions have the same shapes for the whole run, so cuDNN may try its algorithms once per
    # shape. A deterministic run takes the algorithm that cuDNN's heuristics choose.
    tuning = contextlib.nullcontext() if settled.training.deterministic else tuned(algorithms=10)
    with tuning, world.losses_named(trainer.store.newest_in_words):
        return trainer.fit()


def _settle(config: Config, resume: bool, fresh: bool, console: TextConsole) -> Config:
    """`settle_run`, with the threads of CPU arithmetic settled, too.

    Sums depend on how many threads share them. So a resumed run takes the number in its manifest,
    unless the config gives one, and says where that is another.
    """
    settled = settle_run(config, resume=resume, fresh=fresh)
    folder, recorded = Path(settled.run.dir), None
    if resume and (folder / "run_manifest.json").is_file():
        recorded = read_run_config(folder).training.cpu_threads
    threads = settled.training.cpu_threads or recorded or torch.get_num_threads()
    if recorded not in (None, threads):
        console.print(
            f"training.cpu_threads: {recorded} in this run until now, {threads} from here; sums on "
            "a CPU differ in their last bits, so the run does not end bit for bit where it would "
            "have ended",
            soft_wrap=True,
        )
    training = dataclasses.replace(settled.training, cpu_threads=threads)
    return dataclasses.replace(settled, training=training)


def require_allowed(config: Config) -> None:
    """ConfigError where the closed division forbids the config, or it names unused kernels."""
    if config.mlperf.division == "closed":
        require_closed(config)
    require_used(config)


def build_trainer(
    config: Config,
    world: World,
    choices: dict[str, Choice],
    callbacks: list[Callback],
    begins: bool = True,
) -> Trainer:
    """A trainer at sample 0, for a config whose seed is settled, with these kernels.

    Where the run `begins` here, and does not go on from a checkpoint, model.init is read.
    """
    seed = config.training.seed
    if seed is None:
        raise ValueError("the config's seed must be settled (sd_perf.runs.folder.open_run)")
    loader: Loader = build_loader(config, seed, world)
    text_encoder, image_encoder = world.together(lambda: build_encoders(config, world.device))
    if config.data.drop_captions:
        empty = world.together(lambda: _empty_states(config, world))
        loader = CaptionDropout(loader, seed, config.data.drop_captions, empty)
    # Ranges by name would break a graph of torch.compile.
    is_named = config.profile.steps and not config.model.compile
    wrap = named_in_profile if is_named else None
    ops = Ops.chosen(choices, wrap) if config.model.implementation == "fast" else None
    unet = build_unet(config, seed=seed, device=world.device, ops=ops)
    if config.model.init and begins:
        world.together(lambda: copy_first_weights(unet, config))
    step = build_step(
        unet,
        config,
        seed=seed,
        world=world,
        text_encoder=text_encoder,
        image_encoder=image_encoder,
        ops=ops,
    )
    return Trainer(config, world, step=step, loader=loader, callbacks=callbacks)


def _empty_states(config: Config, world: World) -> torch.Tensor | None:
    """The empty caption's text states (T, D) on the CPU, where batches hold text states."""
    if config.encodes_text:
        return None
    with torch.no_grad():
        states = build_text_encoder(config, world.device)([""])[0].float().cpu()
    right = f"{len(states)}, the tokens of {config.text_encoder.model}"
    config.data.require(len(states) == config.data.context_tokens, "context_tokens", right)
    return states


def _pictures(config: Config, world: World) -> FixedPrompts | None:
    """What the main rank draws with while it trains, where sampling.every_samples says so."""
    wanted = world.is_main and config.sampling.every_samples is not None
    return FixedPrompts(config, world.device) if wanted else None


def default_callbacks(
    config: Config, console: TextConsole, pictures: FixedPrompts | None = None
) -> list[Callback]:
    """The callbacks of every run, in an order that matters.

    Signals come before checkpoints, so that the step that sees a signal saves. The MLPerf log comes
    before checkpoints, because a block ends with its last update, not when its state is copied.
    Checkpoints come before the progress display, whose last table names the newest one. Sinks start
    after metrics.jsonl, whose lines they catch up with, and before an MLPerf run's time begins;
    what draws pictures comes before the sinks that take them. A profile begins and ends with the
    step itself, so it comes first.
    """
    log: list[Callback] = [] if config.mlperf.division == "none" else [MLPerfLogger(config)]
    shown = [ProgressDisplay(console), DataWaitWarning(console)]
    tell = partial(_tell, console)
    profiled = [ProfileSteps(tell)] if config.profile.steps else []
    drawn = [DrawSamples(pictures, tell)] if config.sampling.every_samples is not None else []
    first = [*profiled, StopOnSignal(), MetricsFile()]
    return [*first, *drawn, *_copies(config, tell), *log, Checkpointer(), *shown]


def _tell(console: TextConsole, line: str) -> None:
    console.print(visible(line), soft_wrap=True)


def _copies(config: Config, tell: Callable[[str], None]) -> list[Callback]:
    """What copies the run's state to other tools, as the section `logging` says."""
    copies: list[Callback] = []
    if config.logging.sinks:
        copies.append(SendToSinks(tell))
    if config.logging.prometheus:
        copies.append(PrometheusFile(Path(config.logging.prometheus)))
    return copies


def _parity_record(config: Config, console: TextConsole) -> dict[str, Any] | None:
    """The green parity record that an MLPerf run of the fast network needs; else None."""
    if config.mlperf.division == "none" or config.model.implementation == "plain":
        return None
    if "parity" in config.mlperf.waive:
        console.print(
            "waived by name: parity; nothing proves that the fast network computes what the plain "
            "one does"
        )
        return None
    return require_green(config)
