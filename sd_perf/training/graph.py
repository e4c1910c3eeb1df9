"""A training iteration as one CUDA graph: recorded once, then replayed by a single launch."""

from __future__ import annotations

from collections.abc import Callable

import torch


def capture(iteration: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Record an iteration; nothing runs, so weights and optimizer state stay as they are.

    The current stream must be a side stream on which a few iterations have run. They load kernels,
    choose convolution algorithms and create the libraries' workspaces, none of which may happen
    during a capture (torch's "CUDA semantics", section on CUDA graphs). Give gradients back first
    (`zero_grad(set_to_none=True)`), so that the graph's own can take their memory. Replay on the
    same stream, and keep every tensor that the iteration uses alive for as long.

    RuntimeError on the default stream.
    """
    stream = torch.cuda.current_stream()
    if stream == torch.cuda.default_stream():
        raise RuntimeError(
            "a capture needs a side stream; enter torch.cuda.stream(torch.cuda.Stream()) first"
        )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        iteration()
    return graph
