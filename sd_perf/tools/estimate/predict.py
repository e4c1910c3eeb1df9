"""The least time and the memory of a training step on one GPU, by three recipes.

A kernel takes as long as its arithmetic or its bytes, whichever is longer; a step is the sum of its
kernels, of the gaps between them, and of the communication between GPUs that computing does not
hide. What the sums rest on: docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, get_args

from sd_kernels.registry import all_ops
from sd_kernels.sd_v2_shapes import SD_V2, Architecture
from sd_kernels.selection import AUTO, choose
from sd_kernels.spec import Family
from sd_kernels.targets import GPU, AttentionRates, named
from sd_perf.config import Config
from sd_perf.errors import ConfigError
from sd_perf.fast.architecture import architecture
from sd_perf.tools.estimate.communication import (
    Cluster,
    Communication,
    ddp,
    node_sharded,
    torch_ddp,
    zero1,
)
from sd_perf.tools.estimate.eager import plain
from sd_perf.tools.estimate.fused import (
    fused,
    packed_attention_gradients,
    refusals,
    saved_activations,
)
from sd_perf.tools.estimate.published import reached_shares
from sd_perf.tools.estimate.roofline import Kernel
from sd_perf.tools.estimate.submission import submission

_HOST = 5e-6
"""seconds in which the host issues one eager kernel (assumed); the GPU waits where the host is
slower"""
_WORKSPACE = 32 * 2**20
"""bytes that cuBLAS takes on Hopper (torch's documentation of CUBLAS_WORKSPACE_CONFIG)"""


@dataclass(frozen=True)
class Recipe:
    """One way to run a step: the gaps between its kernels, and its attention library."""

    description: str
    gap: float
    """seconds between a kernel and the next (NVIDIA, "Getting Started with CUDA Graphs": 0.9 us in
    a stream, 0.5 us in a graph)"""
    attention: tuple[str, ...]
    """libraries in order of preference: the first with a rate in the GPU's entry is counted"""
    is_eager: bool = False
    """whether the host issues each kernel by itself, and the GPU may have to wait for it"""


RECIPES = {
    "plain": Recipe(
        "plain eager PyTorch, bf16 autocast",
        gap=0.9e-6,
        attention=("FlashAttention 2",),
        is_eager=True,
    ),
    "submission": Recipe(
        "the best MLPerf submission's way",
        gap=0.5e-6,
        attention=("cuDNN", "FlashAttention 4", "FlashAttention 2"),
    ),
    "fused": Recipe(
        "what the ops of sd_kernels amount to",
        gap=0.5e-6,
        attention=("FlashAttention 3", "FlashAttention 4", "FlashAttention 2"),
    ),
}


_LIBRARIES = {
    "fa2": "FlashAttention 2",
    "fa3": "FlashAttention 3",
    "fa4": "FlashAttention 4",
    "cudnn": "cuDNN",
    "te": "cuDNN",
    "flash_sdpa": "FlashAttention 2",
}
"""the library behind a backend of the op `attention`, as `GPU.attention` names it"""
_AFTER_BACKWARD = ("adamw", "average")
"""rows of what runs on all weights after the backward pass"""
_PACKING = ("fa2", "fa3", "fa4", "te")
"""backends of `attention` that write dq, dk and dv into one gradient; torch's write them apart"""


def operators() -> dict[str, list[str]]:
    """Rows of the figures by family: the ops of sd_kernels, and three rows for everything else."""
    rows: dict[str, list[str]] = {family: [] for family in get_args(Family)}
    rows["waiting for the host"] = ["waiting"]
    rows["waiting for other GPUs"] = ["communication"]
    for op, spec in all_ops().items():
        rows[spec.family].append(op)
    rows["optimizer, inputs, loss"].append("average")
    # torch's own sums, copies and casts
    rows["sums, copies, casts"].append("elementwise")
    return rows


def predict(config: Config, gpu: str, batch: int, ranks: int = 1, nodes: int = 1) -> dict[str, Any]:
    """Figures of each recipe in bfloat16, as JSON takes them; those of `fused` at the top, too.

    `fused` is the sum of the ops in one CUDA graph, with the fastest attention that is known for
    the GPU; `installed` is the same with the attention that a run would choose. batch: samples of
    one GPU's step; ranks: GPUs in all, on `nodes` equal nodes.
    Raises ConfigError where the GPU is not known, a number is below 1, or GPUs do not divide.
    """
    try:
        card = named(gpu)
    except LookupError as error:
        raise ConfigError(f"--gpu: {error}") from error
    for name, value in (("--batch", batch), ("--ranks", ranks), ("--nodes", nodes)):
        if value < 1:
            raise ConfigError(f"{name}: {value} cannot be used; it must be at least 1")
    if ranks % nodes:
        raise ConfigError(
            f"--nodes: {nodes} cannot be used; {ranks} ranks do not divide into as many equal nodes"
        )
    cluster = Cluster(card, nodes, gpus_per_node=ranks // nodes)
    # Ranks of the fast network that hold a share of AdamW's state each.
    shares = 1 if config.training.strategy == "ddp" else ranks
    unet = architecture(config)
    eager, eager_saved = plain(config, batch)
    kernels = {
        # torch's fused AdamW in float32 reads gradients, reads and writes weights and two moments.
        "plain": [*eager, Kernel("adamw", 28.0 * unet.parameters)],
        "submission": list(submission(unet, batch, cluster.gpus_per_node)),
        "fused": [
            replace(kernel, bytes=kernel.bytes / shares) if kernel.op == "adamw" else kernel
            for kernel in fused(unet, batch)
        ],
    }
    has_ema = config.training.ema_decay > 0
    held = _held(unet, batch, shares, cluster.gpus_per_node, eager_saved, has_ema)
    kernels = _with_average(kernels, held)
    figures = {
        name: _figures(
            recipe,
            kernels=kernels[name],
            held=held[name],
            cluster=cluster,
            config=config,
            batch=batch,
        )
        for name, recipe in RECIPES.items()
    }
    installed, notes = _installed(config, kernels["fused"], cluster=cluster, batch=batch)
    notes += refusals(unet, batch)
    if config.training.precision != "bf16":
        notes.append(
            f"training.precision is {config.training.precision}; these figures are of bfloat16"
        )
    notes += [
        f"{name}: batch {batch} does not fit into {card.title}; the largest that does is {largest}"
        for name, recipe in figures.items()
        if batch > (largest := recipe["largest_batch"])
    ]
    shown = {"gpu": gpu, "batch": batch, "ranks": ranks, "nodes": nodes, "notes": notes}
    return {**shown, **figures["fused"], "installed": installed, "recipes": figures}


def _with_average(
    kernels: dict[str, list[Kernel]], held: dict[str, dict[str, float]]
) -> dict[str, list[Kernel]]:
    """The kernels of each recipe and, where it holds an average, the one that takes the weights in.

    That reads float32 masters and their average, and writes the average.
    """
    return {
        name: [*own, Kernel("average", 3 * held[name]["ema"])] if "ema" in held[name] else own
        for name, own in kernels.items()
    }


def _held(
    unet: Architecture,
    batch: int,
    shares: int,
    gpus_per_node: int,
    eager_saved: float,
    has_ema: bool,
) -> dict[str, dict[str, float]]:
    """Bytes that live through a step, by recipe; `shares` divide AdamW's state of `fused`.

    With `has_ema` they hold the moving average of the weights, too.
    """
    N = unet.parameters
    held: dict[str, dict[str, float]] = {
        # Autocast keeps its weights in float32 and, for the step, in bfloat16.
        "plain": {
            "weights": (4 + 2) * N,
            "masters": 0,
            "gradients": 4 * N,
            "moments": 8 * N,
            "activations": eager_saved,
        },
        # Whole float32 masters beside 16-bit weights.
        "submission": {
            "weights": 2 * N,
            "masters": 4 * N / gpus_per_node,
            "gradients": 2 * N,
            "moments": 8 * N / gpus_per_node,
            "activations": saved_activations(unet, batch),
        },
        # A master is the weight's 16 bits and 16 more, which alone are kept besides.
        "fused": {
            "weights": 2 * N,
            "masters": 2 * N / shares,
            "gradients": 2 * N,
            "moments": 8 * N / shares,
            "activations": saved_activations(unet, batch),
        },
    }
    if has_ema:
        divided = {"plain": 1, "submission": gpus_per_node, "fused": shares}
        for recipe, ranks in divided.items():
            held[recipe]["ema"] = 4 * N / ranks
    return held


def _installed(
    config: Config, kernels: list[Kernel], *, cluster: Cluster, batch: int
) -> tuple[dict[str, Any], list[str]]:
    """The step with the attention that the config's run would choose on the GPU; and notes.

    `expected` is a range of samples per second, where published runs allow one: see `published`.
    """
    backend, gpu = config.kernels.attention, cluster.gpu
    if backend == AUTO:
        backend = choose("attention", target=gpu.target, cases=all_ops()["attention"].cases).backend
    library = _LIBRARIES.get(backend, "")
    notes = []
    if library not in gpu.attention:
        slowest = min(gpu.attention, key=lambda known: sum(gpu.attention[known].backward))
        name = f"attention by {backend} on {gpu.name}"
        notes.append(f"{name}: no rate is known; counted as {slowest}")
        library = slowest
    recipe = RECIPES["fused"]
    if backend not in _PACKING:
        kernels = [*kernels, *packed_attention_gradients(architecture(config), batch)]
    rates = gpu.attention[library]
    by_op = spent(kernels, gpu=gpu, rates=rates, gap=recipe.gap, batch=batch)
    waited = _communication(recipe, kernels, cluster, rates=rates, config=config).exposed
    at_most = 1e3 / (sum(row["ms_per_sample"] for row in by_op.values()) + 1e3 * waited / batch)
    reached = reached_shares(gpu, _submitted)
    return {
        "attention": backend,
        "attention_rates": library,
        "samples_per_second": at_most,
        "by_op": {op: row for op, row in by_op.items() if row["ms_per_sample"]},
        "expected": [share * at_most for share in reached] if reached else None,
        "shares_reached": list(reached) if reached else None,
    }, notes


@cache
def _submitted(gpu: str, batch: int, ranks: int) -> float:
    """Samples per second and GPU, at most, of the submission's way on one node."""
    card, recipe = named(gpu), RECIPES["submission"]
    kernels = list(submission(SD_V2, batch, ranks))
    rates = _attention_rates(card, recipe)
    by_op = spent(kernels, gpu=card, rates=rates, gap=recipe.gap, batch=batch)
    node = Cluster(card, nodes=1, gpus_per_node=ranks)
    waited = _communication(recipe, kernels, node, rates=rates, config=Config()).exposed
    return 1e3 / (sum(row["ms_per_sample"] for row in by_op.values()) + 1e3 * waited / batch)


def _communication(
    recipe: Recipe,
    kernels: list[Kernel],
    cluster: Cluster,
    *,
    rates: AttentionRates,
    config: Config,
) -> Communication:
    """The collectives of a step, beside the computing that can hide them."""
    forward, backward = (
        sum(
            kernel.calls * (kernel.seconds(cluster.gpu, rates) + recipe.gap)
            for kernel in kernels
            if kernel.backward == is_backward and kernel.op not in _AFTER_BACKWARD
        )
        for is_backward in (False, True)
    )
    parameters = architecture(config).parameters
    if recipe is RECIPES["plain"]:
        return torch_ddp(parameters, cluster, backward)
    if recipe is RECIPES["submission"]:
        return node_sharded(parameters, cluster, backward)
    if config.training.strategy == "ddp":
        return ddp(parameters, cluster, backward)
    return zero1(parameters, cluster, forward, backward)


def _attention_rates(gpu: GPU, recipe: Recipe) -> AttentionRates:
    """The rates of the recipe's most preferred library that the GPU's entry has."""
    known = [library for library in recipe.attention if library in gpu.attention]
    if not known:
        raise ConfigError(
            f"{gpu.name} has no rate of {' or '.join(recipe.attention)}; add one to its entry in "
            "sd_kernels/targets.py"
        )
    return gpu.attention[known[0]]


def spent(
    kernels: Iterable[Kernel], *, gpu: GPU, rates: AttentionRates, gap: float, batch: int
) -> dict[str, dict[str, float]]:
    """Time, work and bytes of a sample by op, and the kernels of a step; `gap` as in `Recipe`."""
    by_op: dict[str, dict[str, float]] = {
        op: {"ms_per_sample": 0.0, "gflop": 0.0, "gigabytes": 0.0, "kernels": 0}
        for ops in operators().values()
        for op in ops
    }
    for kernel in kernels:
        row, calls_per_sample = by_op[kernel.op], kernel.calls / batch
        row["ms_per_sample"] += calls_per_sample * 1e3 * (kernel.seconds(gpu, rates) + gap)
        row["gflop"] += calls_per_sample * kernel.flops / 1e9
        row["gigabytes"] += calls_per_sample * kernel.bytes / 1e9
        row["kernels"] += kernel.calls
    return by_op


def _figures(
    recipe: Recipe,
    *,
    kernels: list[Kernel],
    held: dict[str, float],
    cluster: Cluster,
    config: Config,
    batch: int,
) -> dict[str, Any]:
    """One recipe's time, work and memory; `held` are the bytes that live through a step."""
    gpu = cluster.gpu
    rates = _attention_rates(gpu, recipe)
    by_op = spent(kernels, gpu=gpu, rates=rates, gap=recipe.gap, batch=batch)
    total = sum(row["ms_per_sample"] for row in by_op.values())
    if recipe.is_eager:
        # Host and GPU work side by side: the step takes as long as the slower of them.
        host = sum(kernel.calls for kernel in kernels) * _HOST * 1e3 / batch
        by_op["waiting"]["ms_per_sample"] = max(host - total, 0.0)
        total = max(host, total)
    communication = _communication(recipe, kernels, cluster, rates=rates, config=config)
    waited = 1e3 * communication.exposed / batch
    by_op["communication"]["ms_per_sample"] = waited
    total += waited
    # The allocator must hold the tensors of the largest kernel beside all that is kept. Those of
    # the optimizer are counted already, and it runs when no activation is left.
    workspace = max(kernel.bytes for kernel in kernels if kernel.op not in _AFTER_BACKWARD)
    memory = {name: int(size) for name, size in held.items()} | {
        "workspace": int(workspace) + _WORKSPACE
    }
    # Activations and workspace grow with the batch, the rest does not.
    fixed = sum(held.values()) - held["activations"] + _WORKSPACE
    per_batch = held["activations"] + workspace
    return {
        "samples_per_second": 1e3 / total,
        "ms_per_sample": total,
        "communication_ms": 1e3 * communication.total,
        "communication_exposed_ms": 1e3 * communication.exposed,
        "by_op": {op: row for op, row in by_op.items() if row["ms_per_sample"]},
        "memory_bytes": {**memory, "total": sum(memory.values())},
        "largest_batch": max(int((gpu.memory - fixed) * batch // per_batch), 0),
    }
