"""Predicted time and memory of a training step on one GPU, for three ways of working.

A kernel takes as long as its arithmetic or its bytes, whichever is longer; a step is the sum of its
kernels, and of the gaps between them. Communication between GPUs is not counted. What the sums rest
on: docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sd_kernels.targets import GPU, GPUS, AttentionRates, named
from sd_perf.config import Config
from sd_perf.errors import ConfigError
from sd_perf.fast.architecture import architecture
from sd_perf.files import disk_errors, written_aside
from sd_perf.optional import optional
from sd_perf.tools.estimate.eager import plain
from sd_perf.tools.estimate.kernels import Kernel
from sd_perf.tools.estimate.ways import fused, kept, refusals, submission

WAYS = {
    "plain": "plain eager PyTorch, bf16 autocast",
    "submission": "the best MLPerf submission's way",
    "fused": "what the ops of sd_kernels amount to",
}
_FAMILIES = {
    "convolutions": ("conv", "upsample_conv", "skip_conv"),
    "linear": ("linear",),
    "attention": ("attention",),
    "norms": ("group_norm", "layer_norm"),
    "GEGLU": ("geglu",),
    "sums, copies, casts": ("residual_add", "elementwise"),
    "optimizer, inputs, loss": ("adamw", "diffusion_inputs", "v_mse_loss"),
    "waiting for the host": ("waiting",),
}
_COLOURS = ("#0b5a94", "#5b9bc8", "#9cc3e0", "#b5651d", "#d99a5b", "#7a7a7a", "#b5b5b5", "#e3e3e3")
_OPS = [op for ops in _FAMILIES.values() for op in ops]
_GAP = {"plain": 0.9e-6, "submission": 0.5e-6, "fused": 0.5e-6}
"""seconds between a kernel and the next, in a stream or in a graph (NVIDIA, "Getting Started with
CUDA Graphs")"""
_ATTENTION = {
    "plain": ("FlashAttention 2",),
    "submission": ("cuDNN", "FlashAttention 4", "FlashAttention 2"),
    "fused": ("FlashAttention 3", "FlashAttention 4", "FlashAttention 2"),
}
"""whose attention kernels, the first of which the GPU's entry has a rate"""
_HOST = 5e-6
"""seconds in which the host issues one eager kernel (assumed); the GPU waits where the host is
slower"""
_WORKSPACE = 32 * 2**20
"""bytes that cuBLAS takes on Hopper (torch's documentation of CUBLAS_WORKSPACE_CONFIG)"""


def estimate(config: Config, gpu: str, batch: int, ranks: int = 1) -> dict[str, Any]:
    """Figures per way of working, as JSON takes them; those of `fused` at the top, too. All in
    bfloat16.

    `fused` is what the ops amount to in one CUDA graph, not a step that the trainer has yet.
    ranks: GPUs that share the submission's optimizer state.
    """
    try:
        chosen = named(gpu)
    except LookupError as error:
        raise ConfigError(f"--gpu: {error}") from error
    for name, value in (("--batch", batch), ("--ranks", ranks)):
        if value < 1:
            raise ConfigError(f"{name}: {value} cannot be used; it must be at least 1")
    unet = architecture(config)
    N = unet.parameters
    eager, eager_kept = plain(config, batch)
    kernels = {
        "plain": [
            *eager,
            Kernel("adamw", 28.0 * N),
        ],  # reads gradients, reads and writes the rest, all float32
        "submission": list(submission(unet, batch, ranks)),
        "fused": list(fused(unet, batch)),
    }
    names = ("weights", "masters", "gradients", "moments", "activations")
    held = {  # plain keeps its weights in bfloat16, too; ours keeps the lower half of its masters
        "plain": (6 * N, 0, 4 * N, 8 * N, eager_kept),
        "submission": (
            2 * N,
            4 * N / ranks,
            2 * N,
            8 * N / ranks,
            kept(unet, batch, concatenated=True),
        ),
        "fused": (2 * N, 2 * N, 2 * N, 8 * N, kept(unet, batch, concatenated=False)),
    }
    ways = {
        way: _figures(way, kernels[way], dict(zip(names, held[way], strict=True)), chosen, batch)
        for way in WAYS
    }
    notes = list(refusals(unet, batch))
    if config.training.precision != "bf16":
        notes.append(
            f"training.precision is {config.training.precision}; these figures are of bfloat16"
        )
    for way, figures in ways.items():
        if batch > (largest := figures["largest_batch"]):
            notes.append(
                f"{way}: batch {batch} does not fit into {chosen.title}; the largest that does is "
                f"{largest}"
            )
    return {
        "gpu": gpu,
        "batch": batch,
        "ranks": ranks,
        "notes": notes,
        **ways["fused"],
        "ways": ways,
    }


def _attention_rates(gpu: GPU, way: str) -> AttentionRates:
    """Of the first library of the way that the GPU's entry has."""
    known = [library for library in _ATTENTION[way] if library in gpu.attention]
    if not known:
        raise ConfigError(
            f"{gpu.name} has no rate of {' or '.join(_ATTENTION[way])}; add one to its entry in "
            "sd_kernels/targets.py"
        )
    return gpu.attention[known[0]]


def _figures(
    way: str, kernels: list[Kernel], held: dict[str, float], gpu: GPU, batch: int
) -> dict[str, Any]:
    by_op: dict[str, dict[str, float]] = {
        op: {"ms_per_sample": 0.0, "gflop": 0.0, "gigabytes": 0.0, "kernels": 0} for op in _OPS
    }
    rates = _attention_rates(gpu, way)
    for kernel in kernels:
        row, each = by_op[kernel.op], kernel.calls / batch
        row["ms_per_sample"] += each * 1e3 * (kernel.seconds(gpu, rates) + _GAP[way])
        row["gflop"] += each * kernel.flops / 1e9
        row["gigabytes"] += each * kernel.bytes / 1e9
        row["kernels"] += kernel.calls
    busy = sum(row["ms_per_sample"] for row in by_op.values())
    host = sum(kernel.calls for kernel in kernels) * _HOST * 1e3 / batch if way == "plain" else 0.0
    by_op["waiting"]["ms_per_sample"] = max(host - busy, 0.0)
    total = max(host, busy)
    workspace = max(kernel.bytes for kernel in kernels if kernel.op != "adamw")
    fixed = sum(held.values()) - held["activations"] + _WORKSPACE
    memory = {name: int(size) for name, size in held.items()} | {
        "workspace": int(workspace) + _WORKSPACE
    }
    return {
        "samples_per_second": 1e3 / total,
        "ms_per_sample": total,
        "by_op": {op: row for op, row in by_op.items() if row["ms_per_sample"]},
        "memory_bytes": {**memory, "total": sum(memory.values())},
        "largest_batch": max(
            int((gpu.memory - fixed) * batch // (held["activations"] + workspace)), 0
        ),
    }


def tables(facts: dict[str, Any]) -> Iterable[Any]:
    """The figures for the terminal."""
    from rich.table import Table  # the figures themselves need no terminal

    ways = facts["ways"]
    title = f"{GPUS[facts['gpu']].title}, batch {facts['batch']}: ms and GB per sample, at least"
    times = Table(
        "",
        *(f"{way}\nms" for way in ways),
        *(f"{way}\nGB" for way in ways),
        title=title,
        title_justify="left",
    )
    for op in _OPS:
        rows = [way["by_op"].get(op) for way in ways.values()]
        if any(rows):
            cells = [row and row[key] for key in ("ms_per_sample", "gigabytes") for row in rows]
            times.add_row(op, *("" if cell is None else f"{cell:.3f}" for cell in cells))
    times.add_section()
    moved = [sum(row["gigabytes"] for row in way["by_op"].values()) for way in ways.values()]
    times.add_row(
        "sum",
        *(f"{value:.3f}" for value in [*(way["ms_per_sample"] for way in ways.values()), *moved]),
    )
    times.add_row(
        "samples/s at most", *(f"[bold]{way['samples_per_second']:.1f}[/]" for way in ways.values())
    )
    yield times
    memory = Table("", *ways, title="memory, GB", title_justify="left")
    for name in facts["memory_bytes"]:
        memory.add_row(name, *(f"{way['memory_bytes'][name] / 1e9:.1f}" for way in ways.values()))
    memory.add_row("largest batch", *(f"{way['largest_batch']:,}" for way in ways.values()))
    yield memory
    yield (
        "One GPU; communication is not counted. fused is what the ops amount to; the trainer has "
        "no such step yet."
    )
    yield from facts["notes"]


def draw(facts: dict[str, Any], path: Path) -> None:
    """A PNG of stacked bars, ms per sample by op."""
    figures = optional("matplotlib.figure", "a chart needs matplotlib", "report")
    figure = figures.Figure(figsize=(10.4, 3.4), layout="constrained")
    axes = figure.subplots()
    ways, ends = facts["ways"], [0.0] * len(WAYS)
    for (family, ops), colour in zip(_FAMILIES.items(), _COLOURS, strict=True):
        rows = [[way["by_op"][op] for op in ops if op in way["by_op"]] for way in ways.values()]
        spent = [sum(row["ms_per_sample"] for row in some) for some in rows]
        if any(spent):
            axes.barh(
                list(WAYS.values()), spent, left=ends, color=colour, label=family, height=0.62
            )
            ends = [end + width for end, width in zip(ends, spent, strict=True)]
    for place, (end, way) in enumerate(zip(ends, ways.values(), strict=True)):
        axes.text(end, place, f"  at most {way['samples_per_second']:,.0f} samples/s", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(ends))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"ms per sample, at least: {GPUS[facts['gpu']].title}, batch {facts['batch']}")
    figure.legend(loc="outside upper left", ncols=4, frameon=False)
    with disk_errors(path, "choose another --png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(path) as draft:
            figure.savefig(draft, dpi=150, format="png")
