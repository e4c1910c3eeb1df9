"""The mean squared error in one pass each way.

Forward reads prediction and target and writes one number for each program; torch adds these. The
order of all sums is fixed, so that the loss is repeatable. Backward reads both again, mostly from
the L2 cache, and writes the gradient. Forward could have stored the gradient instead, to save 2 of
14 bytes an element; but it would be rounded twice, before and after the multiplication by the
incoming gradient, which is a fraction of 1 where gradients are accumulated.

Shape letter: N elements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from sd_kernels.column_sum import is_last
from sd_kernels.errors import require, require_floating
from sd_kernels.launch import counters, empty, launch, rounded


@dataclass(frozen=True)
class Tuning:
    """Launch constants."""

    block: int = 1024
    """elements of a program: 8 for each thread of 4 warps, 16 bytes in bfloat16; the benchmark's
    64 x 4 x 64 x 64 latents make 1024 programs"""


TUNING = Tuning()


@triton.jit
def _difference(prediction, target, N, BLOCK: tl.constexpr):
    """prediction - target in float32 (BLOCK,), where the elements are, and which exist."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    # Elements outside load 0 from both, and their difference adds nothing.
    inside = offsets < N
    p = tl.load(prediction + offsets, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(target + offsets, mask=inside, other=0.0).to(tl.float32)
    return p - t, offsets, inside


@triton.jit
def v_mse_loss_forward_kernel(
    prediction, target, partial, loss, counters, N, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    difference, _, _ = _difference(prediction, target, N, BLOCK)
    # Divided here, so that the sum over programs is the mean without another kernel.
    mean = tl.sum(difference * difference) / N
    tl.store(partial + tl.program_id(0), mean)  # narrow: one number a program
    if is_last(counters, tl.num_programs(0)):
        # In a fixed tree; an atomic would depend on the order of the programs.
        parts = tl.arange(0, PARTS)
        inside = parts < tl.num_programs(0)
        parts = partial + parts
        means = tl.load(parts, mask=inside, other=0.0, cache_modifier=".cg")  # narrow: partial sums
        tl.store(loss, tl.sum(means))  # narrow: one number


@triton.jit
def v_mse_loss_backward_kernel(prediction, target, grad, dprediction, N, BLOCK: tl.constexpr):
    difference, offsets, inside = _difference(prediction, target, N, BLOCK)
    # d/dp of the mean of (p - t)^2 is 2 (p - t) / N.
    scale = 2.0 * tl.load(grad) / N  # narrow: one number
    tl.store(dprediction + offsets, difference * scale, mask=inside)


@torch.library.custom_op("sd_kernels::v_mse_loss_forward", mutates_args=())
def v_mse_loss_forward(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean squared error, () float32."""
    N = prediction.numel()
    programs = triton.cdiv(N, TUNING.block)
    partial = empty(prediction, (programs,), torch.float32)
    loss, arrivals = (
        empty(prediction, (), torch.float32),
        counters(prediction, 1, v_mse_loss_forward_kernel, programs),
    )
    sizes = {"PARTS": triton.next_power_of_2(programs), "BLOCK": TUNING.block}
    tensors = prediction, target, partial, loss, arrivals
    launch(v_mse_loss_forward_kernel, (programs,), *tensors, N, **sizes)
    return loss


@torch.library.custom_op("sd_kernels::v_mse_loss_backward", mutates_args=())
def v_mse_loss_backward(
    prediction: torch.Tensor, target: torch.Tensor, grad: torch.Tensor
) -> torch.Tensor:
    """The gradient of the prediction, from that of the loss, () float32."""
    N = prediction.numel()
    dprediction = empty(prediction)
    grid = (triton.cdiv(N, TUNING.block),)
    arguments = prediction, target, grad, dprediction, N
    launch(v_mse_loss_backward_kernel, grid, *arguments, BLOCK=TUNING.block)
    return rounded(dprediction, prediction.dtype)


@v_mse_loss_forward.register_fake
def _(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return prediction.new_empty((), dtype=torch.float32)


@v_mse_loss_backward.register_fake
def _(prediction: torch.Tensor, target: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(prediction)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
    return v_mse_loss_backward(*ctx.saved_tensors, grad), None


v_mse_loss_forward.register_autograd(_backward, setup_context=_save)


def v_mse_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """See `reference.v_mse_loss`; both contiguous or both channels-last, otherwise KernelError.

    Each is float32, bfloat16 or float16; differences and sums are float32.
    """
    require_floating("v_mse_loss", prediction, target)
    shapes = f"{tuple(prediction.shape)} and {tuple(target.shape)}"
    require(prediction.shape == target.shape, "v_mse_loss", shapes, "two tensors of one shape")
    # Elements are paired by address, so that both must have the same order in memory.
    orders = [torch.contiguous_format]
    if prediction.dim() == 4:
        orders.append(torch.channels_last)
    same = any(
        all(tensor.is_contiguous(memory_format=order) for tensor in (prediction, target))
        for order in orders
    )
    strides = f"strides {prediction.stride()} and {target.stride()}"
    require(same, "v_mse_loss", strides, "two contiguous or two channels-last tensors")
    require(
        not target.requires_grad,
        "v_mse_loss",
        "a target that takes a gradient",
        "one that is detached",
    )
    return v_mse_loss_forward(prediction, target)
