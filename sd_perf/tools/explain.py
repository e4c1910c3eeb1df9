"""Ten lines that say what a training run will do and write, before it does."""

from __future__ import annotations

import itertools
import shutil
from collections import Counter
from pathlib import Path

from sd_kernels.spec import Target
from sd_perf.commands import sd_perf_command
from sd_perf.config import Config
from sd_perf.data.shards import find_shards
from sd_perf.errors import DataError, UserError
from sd_perf.fast.architecture import architecture
from sd_perf.fast.choice import choose_kernels, used_ops
from sd_perf.models.first_weights import first_weights_in_words
from sd_perf.runs.checkpoints import CheckpointStore, position
from sd_perf.runs.folder import settle_run
from sd_perf.sinks.feed import RECORD_NAME
from sd_perf.training.memory import least_bytes

_CHECKPOINT_BYTES = 12
"""per parameter: weight and two moments of AdamW, float32"""
_GB = 1e9


def explain(config: Config, *, resume: bool, fresh: bool, ranks: int = 1) -> dict[str, str]:
    """{what: in words} of a run of this config, in the order in which it happens.

    Writes nothing, and reads no data. ConfigError where a kernel cannot be had, or the batch does
    not divide.
    """
    return {
        "run": _run(config, resume, fresh),
        "network": _network(config),
        "data": _data(config),
        "steps": _steps(config, ranks),
        "rate": _rate(config),
        "machine": _machine(config, ranks),
        "saves": _saves(config),
        "writes": _writes(config),
        "sends": _sends(config),
        "then": _then(config),
    }


def _run(config: Config, resume: bool, fresh: bool) -> str:
    folder = Path(config.run.dir)
    try:
        settle_run(config, resume=resume, fresh=fresh)
    except UserError as refusal:
        return f"would be refused: {refusal}"
    newest = CheckpointStore(folder / "checkpoints").newest()
    if resume and newest:
        return f"continues the one in {folder} from {position(newest):,} samples"
    if fresh and newest:
        return f"a new one in {folder}; the complete one there is moved aside"
    return f"a new one in {folder}"


def _network(config: Config) -> str:
    implementation, precision = config.model.implementation, config.training.precision
    return (
        f"UNet of {architecture(config).parameters:,} parameters, {implementation} in {precision}, "
        f"predicts {config.diffusion.prediction}, from {first_weights_in_words(config)}"
    )


def _data(config: Config) -> str:
    data = config.data
    if data.format == "synthetic":
        return "synthetic: drawn from the seed, no files"
    try:
        shards = find_shards(Path(data.path), data.format)
    except DataError as missing:
        return f"{missing}; sd-perf data prepare makes them"
    size = sum(shard.stat().st_size for shard in shards) / _GB
    of = "precomputed text states" if data.context == "precomputed" else config.text_encoder.model
    return f"{len(shards):,} {data.format} shards in {data.path}, {size:.3g} GB; text: {of}"


def _steps(config: Config, ranks: int) -> str:
    batch, accumulate = config.training.global_batch_size, config.training.accumulate_steps
    steps = config.steps_of(config.training.max_samples)
    each = f"{ranks} x {accumulate} micro-batches of {config.micro_batch_size(ranks)}"
    return f"{steps:,} of {batch:,} samples ({each}), {steps * batch:,} samples in all"


def _rate(config: Config) -> str:
    optimizer = config.optimizer
    words = (
        f"AdamW, learning rate {config.learning_rate:.4g} after {optimizer.warmup_steps:,} steps"
    )
    if not optimizer.decay_steps:
        return f"{words}, then constant"
    end = config.learning_rate * optimizer.decay_end
    along = " along a cosine" if optimizer.decay_shape == "cosine" else ""
    return f"{words}, then falling{along} to {end:.4g} in {optimizer.decay_steps:,}"


def _machine(config: Config, ranks: int) -> str:
    target = Target.here()
    device = target.name if config.training.device == "auto" else config.training.device
    words = f"{device}, {ranks} rank{'s' if ranks > 1 else ''}"
    words += f", at least {least_bytes(config, ranks) / _GB:.3g} GB of memory each"
    choices = choose_kernels(config, target)
    if not (used := used_ops(config)):
        return f"{words}; torch's own kernels"
    backends = Counter(choices[op].backend for op in used)
    chosen = ", ".join(f"{name} {count}" for name, count in backends.most_common())
    return f"{words}; kernels: {chosen}"


def _saves(config: Config) -> str:
    average = 4 if config.training.ema_decay else 0
    each = (_CHECKPOINT_BYTES + average) * architecture(config).parameters
    every, keep = config.steps_of(config.checkpoint.every_samples), config.checkpoint.keep
    count = -(-config.steps_of(config.training.max_samples) // every)
    kept = count if keep is None else min(keep, count)
    folder = Path(config.run.dir).absolute()
    parents = itertools.chain([folder], folder.parents)
    free = shutil.disk_usage(next(path for path in parents if path.exists())).free
    samples = every * config.training.global_batch_size
    return (
        f"a checkpoint every {samples:,} samples: {count:,}, of which {kept:,} are kept, "
        f"{each / _GB:.3g} GB each ({kept * each / _GB:.3g} of {free / _GB:,.0f} GB free)"
    )


def _writes(config: Config) -> str:
    names = [
        "run_manifest.json",
        f"metrics.jsonl (a line every {config.logging.every_steps} steps)",
        "checkpoints/",
    ]
    if config.model.implementation == "fast":
        names.append("kernels.json")
    if config.model.init:
        names.append("init.json")
    if config.mlperf.division != "none":
        names.append(f"result_0.txt (MLPerf log, {config.mlperf.division} division)")
    if config.sampling.every_samples:
        names.append(f"samples/ (pictures every {config.sampling.every_samples:,} samples)")
    if config.profile.steps:
        names.append(f"profile/ (of steps {config.profile.steps})")
    if config.logging.sinks:
        names.append(RECORD_NAME)
    return f"to {config.run.dir}: {', '.join(names)}"


def _sends(config: Config) -> str:
    logging = config.logging
    places = {
        "tensorboard": "TensorBoard (tensorboard/)",
        "csv": "CSV files",
        "wandb": f"W&B (project {logging.wandb_project}, {logging.wandb_mode})",
    }
    sent = [places[name] for name in logging.sinks]
    if logging.prometheus:
        sent.append(f"Prometheus ({logging.prometheus})")
    return f"curves and pictures to {', '.join(sent)}" if sent else "nothing to other tools"


def _then(config: Config) -> str:
    folder = config.run.dir
    return (
        f"{sd_perf_command('watch', folder)} meanwhile, {sd_perf_command('evaluate', folder)} "
        "after; Ctrl-C saves, --resume continues"
    )
