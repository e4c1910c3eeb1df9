"""Why the traced step moves more than its operators must: every byte beyond the floor, by cause.

The floor is what the specs of sd_kernels say: each call of an operator reads its inputs and writes
its results once (`OpSpec.work`). What an operator's own kernels move beyond that is one cause for
each operator; every kernel of torch between or inside operators has a cause of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from torch import bfloat16

from sd_kernels.registry import all_ops
from sd_kernels.sd_v2_shapes import Architecture
from sd_perf.tools.estimate.fused import cases
from sd_perf.tools.estimate.ledger_recorder import BACKWARD, FORWARD, OPTIMIZER, REDUCE, Entry

_BEYOND = {
    "attention": "sums of the rows of scores, float32",
    "conv": "both matmuls of backward read the output's gradient",
    "group_norm": "statistics and partial sums",
    "layer_norm": "statistics and partial sums",
    "linear": "no gradient of the text, which the floor has",
    "skip_conv": "both matmuls of backward read its gradient",
    "upsample_conv": "pixels interleaved, weights merged",
}
"""what an operator's own kernels move beyond reading each input and writing each result once"""
_PACKED = {
    FORWARD: "weights packed for one matmul",
    BACKWARD: "gradients of what one matmul made, packed for its backward",
}


def floor(unet: Architecture, batch: int) -> dict[str, float]:
    """Bytes that each operator must move in a step, by what its spec says."""
    total: dict[str, float] = defaultdict(float)
    for op, spec in all_ops().items():
        for case in cases(op, unet, batch):
            work = spec.work(case, bfloat16)
            total[op] += case.calls * (work.forward_bytes + work.backward_bytes)
    return dict(total)


def is_own(entry: Entry) -> bool:
    """Whether a kernel does an operator's work: one of ours, a matmul or an attention."""
    computes = entry.moved.matmul is not None or entry.moved.attention is not None
    return bool(entry.op) and (computes or entry.is_triton)


def cause(entry: Entry) -> str:
    """Why torch launched a kernel that is no operator's own."""
    name = entry.kernel.removesuffix("_")
    if entry.phase == OPTIMIZER:
        return "the optimizer's step count and rates"
    if entry.phase == REDUCE and "copy" in name and "training.flat" in entry.where:
        return "gradients moved into the flat buffer"
    if entry.inside:
        return f"torch's sums, casts and zeros inside {entry.op}"
    if entry.phase == BACKWARD and not entry.where.startswith("sd_kernels"):
        if name == "add":
            what = "of images (skips, residuals)" if len(entry.shape) == 4 else "of all else"
            return f"gradients added: {what}"
        if name == "sum":
            linear = entry.node == "AddmmBackward0"
            return "bias gradients summed: " + ("linear layers" if linear else "all else")
        if name in ("stack", "cat") and entry.op == "attention":
            return "dq, dk and dv packed"
    if name in ("cat", "stack"):
        return _PACKED.get(entry.phase, "packing")
    if name in ("copy", "clone", "_foreach_copy"):
        return "copies"
    return "casts" if name == "_to_copy" else "small kernels of torch"


def rows(entries: Iterable[Entry], unet: Architecture, batch: int) -> dict[str, Any]:
    """Launches and bytes by operator beside the floor, and every cause of what lies beyond it.

    The floor and all causes together are the bytes of the entries.
    """
    least = floor(unet, batch)
    own: dict[str, dict[str, float]] = defaultdict(_nothing)
    causes: dict[str, dict[str, float]] = defaultdict(_nothing)
    for entry in entries:
        found = own[entry.op] if is_own(entry) else causes[cause(entry)]
        found["launches"] += entry.moved.launches
        found["bytes"] += entry.bytes
    ops = {
        op: {**row, "floor": least.get(op, 0.0), "beyond": row["bytes"] - least.get(op, 0.0)}
        for op, row in sorted(own.items())
    }
    for op, row in ops.items():
        name = f"{op}: {_BEYOND[op]}" if op in _BEYOND else "partial sums of all other operators"
        causes[name]["bytes"] += row["beyond"]
    named = [{"cause": name, **row} for name, row in causes.items()]
    return {"ops": ops, "causes": sorted(named, key=lambda row: -float(row["bytes"]))}


def _nothing() -> dict[str, float]:
    return {"launches": 0, "bytes": 0.0}
