"""Convolutions by cuDNN, through torch's convolution.

Input, weights and output are channels-last, so that nothing is transposed or copied.

The fastest of cuDNN's algorithms is found by timing them, once for each shape and direction. The
flag of torch for this belongs to the whole process, and backward passes run after the call has
returned, so no call sets it: the owner of the training step enters `tuned` around warm-up and
capture. The rules follow from torch (aten/src/ATen/native/cudnn/Conv_v8.cpp):

- Torch keeps its choice, timed or not, by shape, strides and alignment of addresses. So the first
  convolution of a shape must run within `tuned`; for one that ran before, the heuristic choice is
  kept, and it is never timed. A timed choice also holds outside `tuned` afterwards.
- Torch keeps choices for each thread. Forward runs in the caller's thread and backward in
  autograd's thread of the device, so warm-up and capture must be called from the same thread.
- Timing synchronises, which a capture forbids. So the warm-up must run every shape of the graph,
  forward and backward.

Shape letters: see `reference`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F

from sd_kernels.errors import require, require_convolution
from sd_kernels.launch import is_recording

OP = "conv/cudnn"


@contextmanager
def tuned(algorithms: int = 0) -> Iterator[None]:
    """Time `algorithms` algorithms (0: all) of each new convolution, and keep the fastest.

    KernelError in a deterministic run, since timing may choose otherwise in each process.
    """
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
    """See `reference.conv`; x, weight and result are dense in channels-last memory.

    KernelError where torch would not give the convolution to cuDNN.
    """
    require_convolution(OP, x, weight)
    # Where launches are recorded or compiled, tensors are fake and torch would choose otherwise.
    if not (torch.compiler.is_compiling() or is_recording()):
        _require_cudnn(x, weight, stride, padding)
    y = F.conv2d(x, weight, stride=stride, padding=padding)
    assert y.is_contiguous(memory_format=torch.channels_last)
    return y


def _require_cudnn(x: torch.Tensor, weight: torch.Tensor, stride: int, padding: int) -> None:
    geometry = [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], 1
    chosen = torch._C._select_conv_backend(x, weight, None, *geometry).name
    what = f"tensors of {x.dtype} on {x.device} that torch would give to {chosen}"
    require(chosen == "Cudnn", OP, what, "CUDA tensors that cuDNN convolves; choose reference")
