"""A training iteration as one CUDA graph: recorded once, then replayed by a single launch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sd_perf.errors import UserError
from sd_perf.files import first_error, one_line

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
        """One iteration, after what is queued on the current stream."""
        if self._graph is None:
            self.iteration()
        else:
            self._graph.replay()

    def warm_up(self, rehearse: Callable[[], None]) -> None:
        """Call what does all that the iteration does, eagerly, on the stream of the capture."""
        # Libraries keep a workspace per stream, so it must be the stream that is captured.
        self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            rehearse()

    def capture(self) -> None:
        """Record the iteration, after `warm_up`; it does not run, and ranks exchange nothing.

        UserError where an operator cannot be captured.
        """
        with torch.cuda.stream(self._stream), naming_the_operator("training.cuda_graph"):
            self._graph = capture(self.iteration)

    def close(self) -> None:
        """Give the graph back. NCCL ends no communicator that a graph still refers to."""
        if self._graph is not None:
            self._graph.reset()
            self._graph = None


def capture(iteration: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Record an iteration; nothing runs, so weights and optimizer state stay as they are.

    The current stream must be a side stream on which a few iterations have run. They load kernels,
    choose convolution algorithms and create the libraries' workspaces, none of which may happen
    during a capture (torch's "CUDA semantics", section on CUDA graphs). No parameter may have a
    gradient, so that those of the graph are born in its own memory. Keep every tensor that the
    iteration uses alive for as long as the graph.

    Other threads may do what a capture forbids: NCCL's watchdog and loaders go on asking the
    device. The backward pass runs in a thread of torch, so that what it may not do is not policed,
    either. RuntimeError on the default stream.
    """
    stream = torch.cuda.current_stream()
    if stream == torch.cuda.default_stream():
        raise RuntimeError(
            "a capture needs a side stream; enter torch.cuda.stream(torch.cuda.Stream()) first"
        )
    graph = torch.cuda.CUDAGraph()
    # thread_local: what other threads do meanwhile is not held against the capture, see above.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        iteration()
    return graph


class _LastOperator(TorchDispatchMode):
    """Remembers the operator that was called last, also in backward passes."""

    name = "no operator yet"

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled code run as it is: torch would run its source instead within a mode."""
        return True

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
        except RuntimeError as error:
            # Ending a capture that has failed fails as well; what failed first is wanted.
            first = first_error(error)
            if isinstance(first, torch.OutOfMemoryError):
                raise first from None
            raise UserError(
                f"{option}: {last.name} cannot be captured in a CUDA graph ({one_line(first)}); "
                f"choose another kernel for it (section kernels), or set {option} to off, which is "
                "slower"
            ) from error
