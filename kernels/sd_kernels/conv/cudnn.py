"""Convolutions by cuDNN, through torch: channels-last in, weights and out, so that nothing is
transposed or copied.

Which of cuDNN's algorithms is fastest is found by timing them, once a shape and direction. torch's
flag for it is the whole process's, so no call sets it: backward passes come after the call has
returned. Whoever owns the step enters `tuned` around warm-up and capture. What torch does
(ATen/native/cudnn/Conv_v8.cpp) makes the rules:

- It keeps what it chose, timed or not, by shape, strides and alignment of addresses. So the first
  convolution of a shape must come within `tuned`: one that ran before has its heuristic choice
  kept, and is never timed. What was timed stays chosen afterwards, also outside.
- It keeps that for each thread. Forward runs in the caller's, backward in autograd's one for the
  device: warm-up and capture must be called from the same thread.
- Timing synchronises, which a capture forbids: warm-up runs every shape of the graph before it,
  forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from sd_kernels.errors import require, require_convolution

OP = "conv/cudnn"


@contextmanager
def tuned(algorithms: int = 0) -> Iterator[None]:
    """Time this many algorithms (0: all) for each convolution that is new to torch, and keep the
    fastest."""
    flags = torch.backends.cudnn
    deterministic = flags.deterministic or torch.are_deterministic_algorithms_enabled()
    takes = (
        "a run that may choose anew in each process (or no tuning: cuDNN's heuristics choose alike)"
    )
    require(not deterministic, OP, "algorithms to time in a deterministic run", takes)
    before = flags.benchmark, flags.benchmark_limit
    flags.benchmark, flags.benchmark_limit = True, algorithms
    try:
        yield
    finally:
        flags.benchmark, flags.benchmark_limit = before


def conv(
    x: torch.Tensor, weight: torch.Tensor, *, stride: int = 1, padding: int = 1
) -> torch.Tensor:
    """See `reference.conv`; x and weight dense in channels-last memory, and so is what comes
    out."""
    require_convolution(OP, x, weight)
    if not torch.compiler.is_compiling():
        _require_cudnn(x, weight, stride, padding)
    y = F.conv2d(x, weight, stride=stride, padding=padding)
    assert y.is_contiguous(memory_format=torch.channels_last)
    return y


def _require_cudnn(x: torch.Tensor, weight: torch.Tensor, stride: int, padding: int) -> None:
    geometry = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1
    chosen = torch._C._select_conv_backend(x, weight, None, *geometry).name
    what = f"tensors of {x.dtype} on {x.device} that torch would give to {chosen}"
    require(chosen == "Cudnn", OP, what, "CUDA tensors that cuDNN convolves; choose reference")
