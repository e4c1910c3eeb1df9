"""The running average of float32 masters: one pass over flat buffers, in place.

It is no op, since there is nothing to choose: on a GPU it is one Triton kernel, elsewhere torch.

Shape letter: N parameters.
"""

from __future__ import annotations

import torch

from sd_kernels.adamw.reference import join_master
from sd_kernels.errors import require


@torch.no_grad()
def average_weights(
    average: torch.Tensor,
    weights: torch.Tensor,
    remainders: torch.Tensor | None,
    rate: torch.Tensor,
) -> None:
    """average += rate (master - average), in place on flat buffers (N,).

    `average` is float32. Masters are float32 `weights`, or bfloat16 ones with 16-bit `remainders`
    (see `sd_kernels.adamw.reference.split_master`). `rate`, 1 - decay, is a float32 scalar on the
    same device, so that a CUDA graph reads it at every replay. KernelError for other inputs.
    """
    is_pair = (remainders is not None) == (weights.dtype == torch.bfloat16)
    got = f"{weights.dtype} weights with{'' if remainders is not None else 'out'} remainders"
    right = "bfloat16 weights with remainders, or float32 weights without"
    require(is_pair and weights.dtype in (torch.float32, torch.bfloat16), "average", got, right)
    got = f"an average {tuple(average.shape)} of {average.dtype}, weights {tuple(weights.shape)}"
    is_fit = average.shape == weights.shape and average.dtype == torch.float32
    require(is_fit, "average", got, "float32 averages of the weights' shape")
    if weights.is_cuda:
        from sd_kernels.average_triton import average_weights as fused

        fused(average, weights, remainders, rate)
        return
    master = weights if remainders is None else join_master(weights, remainders)
    # One rounding for each operation, as the kernel has them.
    average.add_((master - average).mul_(rate))
