"""The running average of masters in one launch: 12 bytes a parameter, each moved once.

Nothing is fused into multiply-adds, so that the result equals that of torch bit for bit.

Shape letter: N parameters.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sd_kernels.launch import launch

BLOCK = 1024
"""elements of a program: 8 a thread of 4 warps, 16 bytes of a bfloat16 stream"""


@triton.jit
def average_kernel(average, weights, remainders, rate, N, BLOCK: tl.constexpr):
    lanes = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = lanes < N
    w = tl.load(weights + lanes, mask=inside, other=0)
    a = tl.load(average + lanes, mask=inside, other=0)
    if remainders is not None:
        # See `adamw.reference.join_master`: a negative remainder takes back the rounding's carry.
        low = tl.load(remainders + lanes, mask=inside, other=0)
        w = ((w.to(tl.int32) << 16) + low.to(tl.int32)).to(tl.float32, bitcast=True)
    a = a + (w - a) * tl.load(rate)  # narrow: one number
    tl.store(average + lanes, a, mask=inside)


def average_weights(
    average: torch.Tensor,
    weights: torch.Tensor,
    remainders: torch.Tensor | None,
    rate: torch.Tensor,
) -> None:
    """See `sd_kernels.average.average_weights`, which checks the tensors."""
    # A bfloat16 weight is read as its bits.
    bits = weights if remainders is None else weights.view(torch.int16)
    N = average.numel()
    arguments = average, bits, remainders, rate, N
    launch(
        average_kernel,
        (triton.cdiv(N, BLOCK),),
        *arguments,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )
