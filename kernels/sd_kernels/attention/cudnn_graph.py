"""Attention by cuDNN's own graph API (nvidia-cudnn-frontend 1.32.0).

These are the kernels of torch's cuDNN attention. torch takes no memory for the gradients, so that
they are packed by a copy; cuDNN takes any strides, and writes them into the slices of one packed
gradient. A graph is built once for every layout of its tensors; it is planned outside of a capture,
in the warm-up, and a CUDA graph records its kernels. Never run on hardware by this project.

Shape letters: B samples, L queries, H heads, D head dim.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any, NamedTuple

import torch

from sd_kernels.attention.registered import registered

_TYPES = {
    torch.bfloat16: "BFLOAT16",
    torch.float16: "HALF",
    torch.float32: "FLOAT",
    torch.float64: "DOUBLE",
}
_FORWARD, _BACKWARD = (
    ("q", "k", "v", "o", "stats"),
    (
        *("q", "k", "v", "o", "stats", "dO"),
        *("dQ", "dK", "dV"),
    ),
)
"""the tensors of a graph, in the order in which they are given to it"""
Layout = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
"""shape, strides and dtype"""


class _Plan(NamedTuple):
    graph: Any
    tensors: tuple[Any, ...]
    workspace_bytes: int


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    out = q.new_empty(q.shape)
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    _run(_FORWARD, q, k, v, out, lse)
    return out, lse


def _backward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: torch.Tensor) -> None:
    out, lse, dout, *slots = others
    _run(_BACKWARD, q, k, v, out, lse, dout, *slots)


def _run(names: tuple[str, ...], *tensors: torch.Tensor) -> None:
    import cudnn

    # cuDNN has heads before rows, and a column for the sums of rows.
    views = [x.unsqueeze(-1) if x.dim() == 3 else x.transpose(1, 2) for x in tensors]
    device, thread = tensors[0].device, threading.get_ident()
    handle = _handle(device, thread)
    layouts = tuple((tuple(x.shape), x.stride(), x.dtype) for x in views)
    plan = _plan(names, layouts, device, thread, torch.are_deterministic_algorithms_enabled())
    if device.type == "cuda":
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device).cuda_stream)
    workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=device)
    plan.graph.execute(dict(zip(plan.tensors, views, strict=True)), workspace, handle=handle)


@cache
def _handle(device: torch.device, thread: int) -> Any:
    """cuDNN forbids threads to share a handle; the backward pass has a thread of its own."""
    import cudnn

    return cudnn.create_handle()


@cache
def _plan(
    names: tuple[str, ...],
    layouts: tuple[Layout, ...],
    device: torch.device,
    thread: int,
    deterministic: bool,
) -> _Plan:
    """The graph for tensors of these layouts, with the plan that cuDNN's heuristics prefer."""
    import cudnn

    dtype = layouts[0][2]
    graph = cudnn.pygraph(
        io_data_type=_type(dtype),
        intermediate_data_type=cudnn.data_type.FLOAT,
        compute_data_type=cudnn.data_type.FLOAT,
        handle=_handle(device, thread),
    )
    options = {"attn_scale": layouts[0][0][-1] ** -0.5}
    count = 3 if names == _FORWARD else 6
    given = {
        name: graph.tensor(name=name, dim=shape, stride=stride, data_type=_type(own))
        for name, (shape, stride, own) in zip(names[:count], layouts, strict=False)
    }
    if names == _FORWARD:
        results = graph.sdpa(name="forward", **given, **options, generate_stats=True)
    else:
        options["use_deterministic_algorithm"] = deterministic
        results = graph.sdpa_backward(name="backward", **given, **options)
    for result, (shape, stride, own) in zip(results, layouts[count:], strict=True):
        result.set_output(True).set_dim(shape).set_stride(stride).set_data_type(_type(own))
    graph.build([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    return _Plan(graph, (*given.values(), *results), graph.get_workspace_size())


def _type(dtype: torch.dtype) -> Any:
    import cudnn

    return getattr(cudnn.data_type, _TYPES[dtype])


attention = registered("cudnn_graph", _forward, _backward)
