"""What a config amounts to, without allocating its weights.

Parameters, FLOPs, memory, batch arithmetic, kernels.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from sd_perf.config import LINEAR_LAYERS, Config
from sd_perf.data.batch import Batch, LoaderOptions
from sd_perf.fast.architecture import architecture
from sd_perf.fast.choice import choose_kernels, target_named, used_ops
from sd_perf.models.first_weights import first_weights_in_words
from sd_perf.reference.unet import UNet
from sd_perf.tools.estimate.eager import plain
from sd_perf.tools.estimate.fused import saved_activations
from sd_perf.training.memory import state_bytes


def dry_run(config: Config, world_size: int, target: str = "here") -> dict[str, Any]:
    """Facts of a run on a GPU of `sd_kernels.targets` or here, as JSON takes them.

    Raises ConfigError where the batch does not divide, or a kernel that is asked for cannot be had
    there.
    """
    micro_batch = config.micro_batch_size(world_size)
    device = target_named(target)
    choices = choose_kernels(config, device)
    # Meta tensors have shapes and no memory: the benchmark's network in a laptop's seconds.
    with torch.device("meta"):
        unet = UNet(config.model)
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    flops_forward, flops_step = _flops(unet, config)
    activations = _activation_bytes(config)
    # Under autocast a bfloat16 copy of each weight lives as long as the step.
    is_autocast = config.training.precision == "bf16" and config.model.implementation == "plain"
    name = "activations" + (
        "_without_checkpointing" if config.model.activation_checkpointing else ""
    )
    memory = {
        **state_bytes(config, world_size),
        "bf16_weight_copies": 2 * parameters if is_autocast else 0,
        name: int(activations * micro_batch),
    }
    batch = config.training.global_batch_size
    return {
        "begins_from": first_weights_in_words(config),
        "predicts": config.diffusion.prediction,
        "parameters": parameters,
        "tensors": len(list(unet.parameters())),
        "gflops_forward": round(flops_forward / 1e9, 1),
        "gflops_forward_backward": round(flops_step / 1e9, 1),
        "memory_bytes": {**memory, "total": sum(memory.values())},
        "data": {"format": config.data.format, "bytes_per_sample": _sample_bytes(config)},
        "batch": {
            "global": batch,
            "ranks": world_size,
            "accumulate_steps": config.training.accumulate_steps,
            "per_rank_and_pass": micro_batch,
        },
        "learning_rate": config.learning_rate,
        "warmup_steps": config.optimizer.warmup_steps,
        "decay_steps": config.optimizer.decay_steps,
        "decay_end": config.optimizer.decay_end,
        "steps": config.steps_of(config.training.max_samples),
        "steps_between_checkpoints": config.steps_of(config.checkpoint.every_samples),
        "linear_layers": {layers: _format(config, layers) for layers in LINEAR_LAYERS},
        "target": device.name,
        "kernels": {op: asdict(choices[op]) for op in used_ops(config)},
    }


def as_table(facts: dict[str, Any]) -> Table:
    """The facts of `dry_run` for the terminal."""
    memory, batch = facts["memory_bytes"], facts["batch"]
    table = Table(show_header=False, title="dry run", title_justify="left")
    table.add_row("begins from", facts["begins_from"])
    table.add_row("predicts", facts["predicts"])
    table.add_row("parameters", f"{facts['parameters']:,} in {facts['tensors']} tensors")
    table.add_row("forward", f"{facts['gflops_forward']:,.1f} GFLOP per sample")
    table.add_row("forward + backward", f"{facts['gflops_forward_backward']:,.1f} GFLOP per sample")
    parts = ", ".join(
        f"{name} {size / 2**30:.2f}" for name, size in memory.items() if name != "total"
    )
    table.add_row("memory per rank", f"{memory['total'] / 2**30:.2f} GiB: {parts}")
    table.add_row(
        "batch",
        f"{batch['global']} samples per step = {batch['ranks']} ranks x "
        f"{batch['accumulate_steps']} "
        f"accumulation steps x {batch['per_rank_and_pass']}",
    )
    data = facts["data"]
    table.add_row("data", f"{data['format']}: {data['bytes_per_sample']:,} bytes a sample")
    formats = facts["linear_layers"]
    named = ", ".join(f"{layers} {number_format}" for layers, number_format in formats.items())
    table.add_row(
        "linear layers", named if len(set(formats.values())) > 1 else next(iter(formats.values()))
    )
    rate, decay_steps = facts["learning_rate"], facts["decay_steps"]
    last = f", {rate * facts['decay_end']:.4g} after {decay_steps:,} more" if decay_steps else ""
    table.add_row("learning rate", f"{rate:.4g} after {facts['warmup_steps']} steps{last}")
    table.add_row(
        "steps", f"{facts['steps']:,}, a checkpoint every {facts['steps_between_checkpoints']:,}"
    )
    return table


def _sample_bytes(config: Config) -> int:
    """Bytes of a sample that the loader hands to the step."""
    options = LoaderOptions(
        0, 1, 1, in_channels=config.model.in_channels, context_dim=config.model.context_dim
    )
    with torch.device("meta"):  # shapes and dtypes as the loader makes them, and no memory
        batch = Batch.empty(np.zeros(1, np.int64), config.data, options)
    tensors = batch.moments, batch.pixels, batch.context
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def _format(config: Config, layers: str) -> str:
    arithmetic = config.precision.of(layers)
    return config.training.precision if arithmetic == "bf16" else arithmetic


def _activation_bytes(config: Config) -> float:
    """Bytes per sample that forward saves for backward, parameters aside."""
    if config.model.implementation == "plain" or config.training.precision == "fp32":
        return plain(config, batch=1, autocast=config.training.precision == "bf16")[1]
    # The fast UNet never concatenates a skip.
    return saved_activations(architecture(config), batch=1)


def _inputs(config: Config, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One sample's latents, timesteps and text states on the meta device."""
    size = config.data.latent_size
    with torch.device("meta"):
        latents = torch.empty(1, config.model.in_channels, size, size, dtype=dtype)
        context = torch.empty(1, config.data.context_tokens, config.model.context_dim, dtype=dtype)
        return latents, torch.zeros(1, dtype=torch.int64), context


def _flops(unet: UNet, config: Config) -> tuple[int, int]:
    """FLOPs per sample of forward and of forward + backward; a multiply-add counts as two."""
    with FlopCounterMode(display=False) as forward:
        output = unet(*_inputs(config, torch.float32))
    # Any scalar of the output has the same backward pass as the loss.
    with FlopCounterMode(display=False) as backward:
        output.square().mean().backward()
    return forward.get_total_flops(), forward.get_total_flops() + backward.get_total_flops()
