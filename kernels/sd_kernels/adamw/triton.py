"""AdamW in one launch and one pass: every buffer is read once and written once, whatever it is kept
in.

bfloat16 streams are read and written as their bits, and rounded by integer arithmetic: eight
elements a thread make one 16-byte access of a 16-bit stream and two of a float32 one, all loads of
a thread in flight before the first use. Division and root are rounded correctly and nothing is
fused, so the result is the reference's bit for bit.

Shape letter: N parameters.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sd_kernels.adamw.reference import check, coefficients
from sd_kernels.errors import require
from sd_kernels.launch import launch

BLOCK = 1024
"""elements of a program: 4 warps have 8 a thread"""


@triton.jit
def _load(buffer, left, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """float32 or, of a 16-bit stream, the bits."""
    lanes = tl.arange(0, BLOCK)
    if WHOLE:
        return tl.load(buffer + lanes)
    return tl.load(
        buffer + lanes, mask=lanes < left, other=0
    )  # narrow: the last program's, where N cuts it off


@triton.jit
def _store(buffer, x, left, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    if WHOLE:
        tl.store(buffer + lanes, x)
    else:
        tl.store(
            buffer + lanes, x, mask=lanes < left
        )  # narrow: the last program's, where N cuts it off


@triton.jit
def _widened(x):
    """float32 of float32, or of the bits of bfloat16."""
    if x.dtype == tl.int16:
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x


@triton.jit
def _bits(x):
    # One pattern of NaN: NVIDIA's, 0x7FFFFFFF, would carry into the sign when rounded.
    return tl.where(x == x, x.to(tl.int32, bitcast=True), 0x7FC00000)


@triton.jit
def _narrowed(x, dtype: tl.constexpr):
    """float32 for a float32 stream; for one of 16 bits, those of bfloat16 rounded to nearest
    even."""
    if dtype == tl.int16:
        bits = _bits(x)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.int16)
    return x


@triton.jit
def _update(
    weights,
    remainders,
    grads,
    exp_avg,
    exp_avg_sq,
    scalars,
    left,
    rest1,
    rest2,
    eps,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    w = _load(weights, left, WHOLE, BLOCK)
    if remainders is not None:
        low = _load(remainders, left, WHOLE, BLOCK)
    g = _widened(_load(grads, left, WHOLE, BLOCK))
    m = _widened(_load(exp_avg, left, WHOLE, BLOCK))
    v = _widened(_load(exp_avg_sq, left, WHOLE, BLOCK))
    step_size = tl.load(scalars)  # narrow: one number
    decay = tl.load(scalars + 1)  # narrow: one number
    root_scale = tl.load(scalars + 2)  # narrow: one number
    if remainders is not None:
        w = ((w.to(tl.int32) << 16) + low.to(tl.int32)).to(tl.float32, bitcast=True)
    m = m + (g - m) * rest1
    v = v + (g * g - v) * rest2
    update = tl.div_rn(m, tl.sqrt_rn(v) * root_scale + eps)
    w = w - (w * decay + update * step_size)
    _store(exp_avg, _narrowed(m, exp_avg.dtype.element_ty), left, WHOLE, BLOCK)
    _store(exp_avg_sq, _narrowed(v, exp_avg_sq.dtype.element_ty), left, WHOLE, BLOCK)
    if remainders is not None:
        bits = _bits(w)
        _store(weights, ((bits + 0x8000) >> 16).to(tl.int16), left, WHOLE, BLOCK)
        _store(remainders, bits.to(tl.int16), left, WHOLE, BLOCK)
    else:
        _store(weights, w, left, WHOLE, BLOCK)


@triton.jit
def adamw_kernel(
    weights,
    remainders,
    grads,
    exp_avg,
    exp_avg_sq,
    scalars,
    N,
    rest1,
    rest2,
    eps,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    left = N - start
    weights += start
    if remainders is not None:
        remainders += start
    grads += start
    exp_avg += start
    exp_avg_sq += start
    # A mask would make every access narrow, since N is seldom a multiple of 16: only the last
    # program has one.
    if left >= BLOCK:
        _update(
            weights,
            remainders,
            grads,
            exp_avg,
            exp_avg_sq,
            scalars,
            left,
            rest1,
            rest2,
            eps,
            True,
            BLOCK,
        )
    else:
        _update(
            weights,
            remainders,
            grads,
            exp_avg,
            exp_avg_sq,
            scalars,
            left,
            rest1,
            rest2,
            eps,
            False,
            BLOCK,
        )


def _stream(buffer: torch.Tensor) -> torch.Tensor:
    require(
        buffer.data_ptr() % 16 == 0,
        "adamw",
        f"a buffer at address {buffer.data_ptr()}",
        "multiples of 16 bytes",
    )
    return buffer if buffer.dtype == torch.float32 else buffer.view(torch.int16)


@torch.library.custom_op(
    "sd_kernels::adamw_update", mutates_args=("weights", "remainders", "exp_avg", "exp_avg_sq")
)
def adamw_update(
    weights: torch.Tensor,
    remainders: torch.Tensor | None,
    grads: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    scalars: torch.Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    launch(
        adamw_kernel,
        (triton.cdiv(weights.numel(), BLOCK),),
        _stream(weights),
        None if remainders is None else _stream(remainders),
        _stream(grads.contiguous()),
        _stream(exp_avg),
        _stream(exp_avg_sq),
        scalars,
        weights.numel(),
        1 - beta1,
        1 - beta2,
        eps,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )


@torch.no_grad()
def adamw(
    weights: torch.Tensor,
    remainders: torch.Tensor | None,
    grads: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: torch.Tensor,
    learning_rate: torch.Tensor,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
) -> tuple[torch.Tensor, ...]:
    """See `reference.adamw`; buffers begin at multiples of 16 bytes."""
    check(weights, remainders, grads, exp_avg, exp_avg_sq, step, learning_rate)
    scalars = coefficients(step, learning_rate, beta1, beta2, weight_decay).float()
    adamw_update(weights, remainders, grads, exp_avg, exp_avg_sq, scalars, beta1, beta2, eps)
    updated = weights, exp_avg, exp_avg_sq
    return updated if remainders is None else (*updated, remainders)
