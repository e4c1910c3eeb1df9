"""AdamW in one launch and one pass: every buffer is read once and written once, whatever its dtype.

Streams of bfloat16 are read and written as their bits and rounded by integer arithmetic. So eight
elements a thread make one 16-byte access of a 16-bit stream and two of a float32 one, and all loads
of a thread are in flight before the first use. Division and square root are rounded correctly, and
nothing is fused, so that the result equals `reference.adamw` bit for bit.

Shape letter: N parameters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from sd_kernels.adamw.reference import check
from sd_kernels.errors import require
from sd_kernels.launch import empty, launch


@dataclass(frozen=True)
class Tuning:
    """Launch constants."""

    block: int = 1024
    """elements of a program: 8 a thread of 4 warps, 16 bytes of a bfloat16 stream"""
    warps: int = 4
    """warps of a program: fixed, since `block` relies on it"""


TUNING = Tuning()


@triton.jit
def _load(buffer, remaining, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """A block (BLOCK,) of a stream: float32, or the bits of 16-bit numbers."""
    lanes = tl.arange(0, BLOCK)
    if WHOLE:
        return tl.load(buffer + lanes)
    return tl.load(buffer + lanes, mask=lanes < remaining, other=0)  # narrow: the last program


@triton.jit
def _store(buffer, x, remaining, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Writes a block of a stream."""
    lanes = tl.arange(0, BLOCK)
    if WHOLE:
        tl.store(buffer + lanes, x)
    else:
        tl.store(buffer + lanes, x, mask=lanes < remaining)  # narrow: the last program


@triton.jit
def _to_float32(x):
    """float32 of float32, or of the bits of bfloat16."""
    if x.dtype == tl.int16:
        # bfloat16 is the upper half of float32.
        x = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return x


@triton.jit
def _bits(x):
    """The bits of float32, int32, with one pattern for all NaN."""
    # NVIDIA's arithmetic gives NaN as 0x7FFFFFFF, which would carry into the sign when rounded.
    return tl.where(x == x, x.to(tl.int32, bitcast=True), 0x7FC00000)


@triton.jit
def _to_stream(x, dtype: tl.constexpr):
    """float32 for a float32 stream; for a 16-bit one the bits of bfloat16, to nearest even."""
    if dtype == tl.int16:
        bits = _bits(x)
        # Half an ulp less one, and one more where the upper half is odd: ties go to even.
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
    remaining,
    one_minus_betas,
    eps,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Updates one block in place; `scalars` (3,) as `reference.coefficients` gives them."""
    # All loads come before the first use, so that all are in flight.
    w = _load(weights, remaining, WHOLE, BLOCK)
    if remainders is not None:
        low = _load(remainders, remaining, WHOLE, BLOCK)
    g = _to_float32(_load(grads, remaining, WHOLE, BLOCK))
    m = _to_float32(_load(exp_avg, remaining, WHOLE, BLOCK))
    v = _to_float32(_load(exp_avg_sq, remaining, WHOLE, BLOCK))
    step_size = tl.load(scalars)  # narrow: one number
    decay = tl.load(scalars + 1)  # narrow: one number
    root_scale = tl.load(scalars + 2)  # narrow: one number
    if remainders is not None:
        # See `reference.join_master`: a negative remainder takes back the carry of the rounding.
        w = ((w.to(tl.int32) << 16) + low.to(tl.int32)).to(tl.float32, bitcast=True)
    # Loshchilov and Hutter, "Decoupled Weight Decay Regularization" (2019), algorithm 2. One
    # rounding an operation, in the order of the reference.
    one_minus_beta1, one_minus_beta2 = one_minus_betas
    m = m + (g - m) * one_minus_beta1
    v = v + (g * g - v) * one_minus_beta2
    update = tl.div_rn(m, tl.sqrt_rn(v) * root_scale + eps)
    w = w - (w * decay + update * step_size)
    _store(exp_avg, _to_stream(m, exp_avg.dtype.element_ty), remaining, WHOLE, BLOCK)
    _store(exp_avg_sq, _to_stream(v, exp_avg_sq.dtype.element_ty), remaining, WHOLE, BLOCK)
    if remainders is not None:
        # See `reference.split_master`: ties away from zero, so that remainders fit into 16 bits.
        bits = _bits(w)
        _store(weights, ((bits + 0x8000) >> 16).to(tl.int16), remaining, WHOLE, BLOCK)
        _store(remainders, bits.to(tl.int16), remaining, WHOLE, BLOCK)
    else:
        _store(weights, w, remaining, WHOLE, BLOCK)


@triton.jit
def coefficients_kernel(
    step,
    learning_rate,
    scalars,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
    WEIGHT_DECAY: tl.constexpr,
):
    # See `reference.coefficients`, which takes torch ten launches.
    count = tl.load(step).to(tl.float64)  # narrow: one number
    rate = tl.load(learning_rate).to(tl.float64)  # narrow: one number
    correction1 = 1.0 - tl.exp(count * LOG_BETA1)
    correction2 = 1.0 - tl.exp(count * LOG_BETA2)
    tl.store(scalars, (rate / correction1).to(tl.float32))  # narrow: one number
    tl.store(scalars + 1, (rate * WEIGHT_DECAY).to(tl.float32))  # narrow: one number
    tl.store(scalars + 2, (1.0 / tl.sqrt(correction2)).to(tl.float32))  # narrow: one number


@triton.jit
def adamw_kernel(
    weights, remainders, grads, exp_avg, exp_avg_sq, scalars, N, one_minus_beta1, one_minus_beta2,
    eps, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    remaining = N - start
    weights += start
    if remainders is not None:
        remainders += start
    grads += start
    exp_avg += start
    exp_avg_sq += start
    betas = (one_minus_beta1, one_minus_beta2)
    # Only the last program has a mask. N is seldom a multiple of 16, and the compiler splits a
    # masked access whose mask it cannot prove constant over 16 bytes.
    if remaining >= BLOCK:
        _update(
            weights,
            remainders,
            grads,
            exp_avg,
            exp_avg_sq,
            scalars,
            remaining,
            betas,
            eps,
            WHOLE=True,
            BLOCK=BLOCK,
        )
    else:
        _update(
            weights,
            remainders,
            grads,
            exp_avg,
            exp_avg_sq,
            scalars,
            remaining,
            betas,
            eps,
            WHOLE=False,
            BLOCK=BLOCK,
        )


def _stream(buffer: torch.Tensor) -> torch.Tensor:
    """The buffer as the kernel reads it; KernelError where its address is not aligned."""
    # A view into a flat buffer may start anywhere, and 16-byte accesses may not.
    got = f"a buffer at address {buffer.data_ptr()}"
    require(buffer.data_ptr() % 16 == 0, "adamw", got, "multiples of 16 bytes")
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
    """`adamw` with `scalars` (3,) float32 in place of step, learning rate and weight decay."""
    N, moments = weights.numel(), (_stream(exp_avg), _stream(exp_avg_sq))
    lower = None if remainders is None else _stream(remainders)
    buffers = _stream(weights), lower, _stream(grads.contiguous()), *moments
    launch(
        adamw_kernel,
        (triton.cdiv(N, TUNING.block),),
        *(*buffers, scalars, N, 1 - beta1, 1 - beta2, eps),
        BLOCK=TUNING.block,
        num_warps=TUNING.warps,
        # A fused multiply-add rounds once where the reference rounds twice.
        enable_fp_fusion=False,
    )


@torch.library.custom_op("sd_kernels::adamw_coefficients", mutates_args=())
def adamw_coefficients(
    step: torch.Tensor, learning_rate: torch.Tensor, beta1: float, beta2: float, weight_decay: float
) -> torch.Tensor:
    """`reference.coefficients` (3,) float32."""
    scalars = empty(step, (3,), torch.float32)
    logarithms = (math.log(beta) if beta else -math.inf for beta in (beta1, beta2))
    logs = dict(zip(("LOG_BETA1", "LOG_BETA2"), logarithms, strict=True))
    tensors = step, learning_rate, scalars
    launch(coefficients_kernel, (1,), *tensors, **logs, WEIGHT_DECAY=weight_decay)
    return scalars


@adamw_coefficients.register_fake
def _(step, learning_rate, beta1, beta2, weight_decay):
    return step.new_empty(3, dtype=torch.float32)


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
    """See `reference.adamw`; float32 or bfloat16, buffers at addresses of multiples of 16 bytes."""
    check(weights, remainders, grads, exp_avg, exp_avg_sq, step, learning_rate)
    scalars = adamw_coefficients(step, learning_rate, beta1, beta2, weight_decay)
    adamw_update(weights, remainders, grads, exp_avg, exp_avg_sq, scalars, beta1, beta2, eps)
    updated = weights, exp_avg, exp_avg_sq
    return updated if remainders is None else (*updated, remainders)
