"""The mean squared error in one pass each way: forward reads both and writes one number a program,
backward reads both and writes the gradient.

Backward reads prediction and target again, mostly from L2, rather than a gradient that forward has
left: that would save 2 of 14 bytes an element, but be rounded before it is multiplied by the
incoming gradient (which accumulation makes a fraction of 1), and again after. The sum is
deterministic: a tree in a program, then torch's over programs.

Shape letters: N elements.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from sd_kernels.errors import require, require_floating
from sd_kernels.launch import empty, launch, rounded

BLOCK = 1024
"""elements of a program: 8 a thread, 1024 programs at the benchmark's size"""


@triton.jit
def _difference(prediction, target, N, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < N
    p = tl.load(prediction + offsets, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(target + offsets, mask=inside, other=0.0).to(tl.float32)
    return p - t, offsets, inside


@triton.jit
def v_mse_loss_forward_kernel(prediction, target, partial, N, BLOCK: tl.constexpr):
    difference, _, _ = _difference(prediction, target, N, BLOCK)
    tl.store(
        partial + tl.program_id(0), tl.sum(difference * difference) / N
    )  # narrow: one number a program


@triton.jit
def v_mse_loss_backward_kernel(prediction, target, grad, dprediction, N, BLOCK: tl.constexpr):
    difference, offsets, inside = _difference(prediction, target, N, BLOCK)
    scale = 2.0 * tl.load(grad) / N  # narrow: one number
    tl.store(dprediction + offsets, difference * scale, mask=inside)


@torch.library.custom_op("sd_kernels::v_mse_loss_forward", mutates_args=())
def v_mse_loss_forward(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    N = prediction.numel()
    programs = triton.cdiv(N, BLOCK)
    partial = empty(prediction, (programs,), torch.float32)
    launch(v_mse_loss_forward_kernel, (programs,), prediction, target, partial, N, BLOCK=BLOCK)
    return partial.sum()


@torch.library.custom_op("sd_kernels::v_mse_loss_backward", mutates_args=())
def v_mse_loss_backward(
    prediction: torch.Tensor, target: torch.Tensor, grad: torch.Tensor
) -> torch.Tensor:
    N = prediction.numel()
    dprediction = empty(prediction)
    arguments = prediction, target, grad, dprediction, N
    launch(v_mse_loss_backward_kernel, (triton.cdiv(N, BLOCK),), *arguments, BLOCK=BLOCK)
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
    """See `reference.v_mse_loss`; float32, bfloat16 or float16 each, both contiguous or both
    channels-last."""
    require_floating("v_mse_loss", prediction, target)
    shapes = f"{tuple(prediction.shape)} and {tuple(target.shape)}"
    require(prediction.shape == target.shape, "v_mse_loss", shapes, "two tensors of one shape")
    orders = [torch.contiguous_format] + [torch.channels_last] * (prediction.dim() == 4)
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
