"""A training iteration as one CUDA graph: recorded once, then replayed by a single launch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sd_perf.errors import UserError
from sd_perf.files import one_line

WARM_UP_PASSES = 3
"""eager passes before a capture: cuDNN and cuBLAS choose on the first, allocations settle on the
second, and the third shows that nothing is left to do"""


class Runner:
    """`run()` calls an iteration, or replays the graph that `capture` has made of it."""

    def __init__(self, iteration: Callable[[], None]) -> None:
        self.iteration = iteration
        self._graph: torch.cuda.CUDAGraph | None = None
        self._stream: torch.cuda.Stream | None = None

    def run(self) -> None:
        """One iteration. What is queued on the current stream comes before it, and what follows
        comes after."""
        if self._graph is None or self._stream is None:
            self.iteration()
            return
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._graph.replay()
        current.wait_stream(self._stream)

    def capture(self, warm_up: Callable[[], None]) -> None:
        """Warm up and record, both on a stream of the graph's own; the iteration does not run.

        `warm_up` runs all that the iteration does, eagerly, and leaves its state as it was.
        UserError where an operator cannot be captured.
        """
        self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            warm_up()
            # What the warm-up allocated goes back to the driver, for the graph's own memory.
            torch.cuda.empty_cache()
            with naming_the_operator("training.cuda_graph"):
                self._graph = capture(self.iteration)


def capture(iteration: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Record an iteration; nothing runs, so weights and optimizer state stay as they are.

    The current stream must be a side stream on which a few iterations have run. They load kernels,
    choose convolution algorithms and create the libraries' workspaces, none of which may happen
    during a capture (torch's "CUDA semantics", section on CUDA graphs). Give gradients back first
    (`zero_grad(set_to_none=True)`), so that the graph's own can take their memory. Replay on the
    same stream, and keep every tensor that the iteration uses alive for as long.

    Only what this thread calls is forbidden what a capture forbids: NCCL's watchdog and the threads
    of loaders go on asking the device. RuntimeError on the default stream.
    """
    stream = torch.cuda.current_stream()
    if stream == torch.cuda.default_stream():
        raise RuntimeError(
            "a capture needs a side stream; enter torch.cuda.stream(torch.cuda.Stream()) first"
        )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        iteration()
    return graph


class _LastOperator(TorchDispatchMode):
    """Remembers the operator that was called last, also in backward passes."""

    name = "no operator yet"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.name = str(func)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def naming_the_operator(option: str) -> Iterator[None]:
    """Turn an error within into a UserError that names the operator which was called last.

    `option` is the config's key that asked for the capture.
    """
    with _LastOperator() as last:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UserError(
                f"{option}: {last.name} cannot be captured in a CUDA graph ({one_line(error)}); "
                f"choose another kernel for it (section kernels), or set {option} to off, which is "
                "slower"
            ) from error
