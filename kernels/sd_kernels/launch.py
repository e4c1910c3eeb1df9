"""All Triton kernels run through `launch`, which counts launches, or records them instead.

Under Triton's interpreter (TRITON_INTERPRET=1 when triton is imported) kernels take CPU tensors.
The interpreter truncates where a GPU rounds, when it stores bfloat16 or FP8. So there `empty`
allocates outputs of low precision in float32, and `rounded` rounds them with torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton

from sd_kernels.errors import KernelError

executed: Counter[str] = Counter()
"""number of launches in this process by kernel name"""


@dataclass(frozen=True)
class Launch:
    """A recorded launch: the arguments that Triton's own binder would be given."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


_counters: dict[tuple[Any, ...], torch.Tensor] = {}


@dataclass
class _State:
    recorded: list[Launch] | None = None
    poison: bool = False


_state = _State()


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return bool(triton.knobs.runtime.interpret)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Record launches instead of running them; tensors may be empty and on any device."""
    launches: list[Launch] = []
    _state.recorded = launches
    try:
        yield launches
    finally:
        _state.recorded = None


def is_recording() -> bool:
    """Whether launches are recorded; then a matmul of torch between them need not run either."""
    return _state.recorded is not None


@contextmanager
def poisoned_outputs() -> Iterator[None]:
    """Fill tensors of `empty` with NaN (integers: their minimum), to show unwritten elements."""
    _state.poison = True
    try:
        yield
    finally:
        _state.poison = False


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run `kernel[grid](*arguments, **options)`; constexprs, num_warps and num_stages are options.

    KernelError where tensors are not on a GPU and there is no interpreter.
    """
    # Multiplications and additions are fused unless an option says otherwise: the default of Triton
    # changes between versions.
    options.setdefault("enable_fp_fusion", True)
    if _state.recorded is not None:
        _state.recorded.append(Launch(kernel, grid, arguments, options))
        return
    tensor = next(argument for argument in arguments if isinstance(argument, torch.Tensor))
    name = kernel.__name__ if hasattr(kernel, "__name__") else kernel.fn.__name__
    if tensor.device.type != "cuda" and not interpreted():
        raise KernelError(
            f"{name}: got tensors on {tensor.device}; takes CUDA tensors (the reference backend "
            "takes any; "
            "TRITON_INTERPRET=1 in the environment runs kernels on a CPU, slowly)"
        )
    executed[name] += 1
    kernel[grid](*arguments, **options)


def empty(
    like: torch.Tensor, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """An output tensor for a launch; `rounded` must follow the launch.

    Without `shape` it has the shape of `like` and is dense, channels-last where `like` is; with
    `shape` it is contiguous. The dtype is that of `like` unless given.
    """
    dtype = dtype or like.dtype
    if interpreted() and dtype.is_floating_point and dtype.itemsize < 4:
        dtype = torch.float32
    if shape is not None:
        output = torch.empty(shape, dtype=dtype, device=like.device)
    else:
        output = torch.empty_like(like, dtype=dtype, memory_format=_dense_format(like))
    if _state.poison:
        output.fill_(float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min)
    return output


def counters(like: torch.Tensor, size: int, *alike: Any) -> torch.Tensor:
    """Counters (size,) int64 by which the programs of a launch find out how far the others are.

    They are zero before the first launch and count for ever: a launch adds as much to each as the
    one before it, so that a kernel knows from the quotient how many launches there were, and nobody
    has to clear them. `alike` is what that amount depends on, the kernel and its sizes. Launches on
    one stream share them, since these run one after the other. A graph has those of the stream on
    which it was captured, and must not be replayed beside that stream's own launches.
    """
    if _state.recorded is not None:
        return torch.empty(size, dtype=torch.int64, device=like.device)
    stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
    key = (like.device, stream, size, *alike)
    if key in _counters:
        return _counters[key]
    zeros = torch.zeros(size, dtype=torch.int64, device=like.device)
    # Zeros of a capture without a warm-up before it are the graph's: each replay writes them anew.
    if not (like.is_cuda and torch.cuda.is_current_stream_capturing()):
        _counters[key] = zeros
    return zeros


def _dense_format(tensor: torch.Tensor) -> torch.memory_format:
    is_image = tensor.dim() == 4 and tensor.stride(1) == 1
    return torch.channels_last if is_image else torch.contiguous_format


def rounded(output: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of `empty` in the dtype that was asked for: a copy in the interpreter only."""
    return output if output.dtype == dtype else output.to(dtype)
