"""The errors of this package. A message is one sentence: what was given, and what is accepted."""

from __future__ import annotations

import torch

FLOATING = (torch.float32, torch.bfloat16, torch.float16)


class KernelError(ValueError):
    """Inputs that an op does not take, or a backend that cannot be had."""


def require(condition: bool, op: str, got: str, takes: str) -> None:
    """Raise KernelError unless the condition holds."""
    if not condition:
        raise KernelError(f"{op}: got {got}; takes {takes}")


def require_floating(op: str, *tensors: torch.Tensor, double: bool = False) -> None:
    """Raise KernelError for other dtypes than 32 and 16 bits, several devices, or an empty tensor.

    `double` also accepts float64, in which adapters of torch's operators are tested.
    """
    for tensor in tensors:
        is_taken = tensor.dtype in FLOATING or (double and tensor.dtype == torch.float64)
        require(is_taken, op, str(tensor.dtype), "float32, bfloat16 or float16")
        require(
            tensor.numel() > 0, op, f"the empty shape {tuple(tensor.shape)}", "at least one element"
        )
        require(
            tensor.device == tensors[0].device,
            op,
            f"{tensors[0].device} and {tensor.device}",
            "one device",
        )


def require_one_dtype(op: str, *tensors: torch.Tensor) -> None:
    """Raise KernelError unless all tensors have the first one's dtype."""
    for tensor in tensors:
        require(
            tensor.dtype == tensors[0].dtype,
            op,
            f"{tensors[0].dtype} and {tensor.dtype}",
            "one dtype",
        )


def require_convolution(
    op: str, x: torch.Tensor, weight: torch.Tensor, takes_wide: bool = False
) -> None:
    """Raise KernelError unless x (B, C, H, W) and weight (O, C, h, w) can be convolved.

    Both must be dense in channels-last memory and have one dtype and device. With `takes_wide` the
    weight may also be float32.
    """
    for name, tensor in (("x", x), ("weight", weight)):
        what = f"{name} of shape {tuple(tensor.shape)}"
        require(tensor.dim() == 4 and tensor.numel() > 0, op, what, "four axes, none of them empty")
        require(
            tensor.is_floating_point(), op, f"{name} of {tensor.dtype}", "floating-point numbers"
        )
        # Otherwise cuDNN would be given a copy at every call.
        is_dense = tensor.is_contiguous(memory_format=torch.channels_last)
        strides = f"{what} with strides {tensor.stride()}"
        require(
            is_dense,
            op,
            strides,
            f"channels-last memory ({name}.to(memory_format=torch.channels_last))",
        )
    dtypes = (x.dtype, torch.float32) if takes_wide else (x.dtype,)
    alike = weight.dtype in dtypes and x.device == weight.device
    both = f"x of {x.dtype} on {x.device} and weight of {weight.dtype} on {weight.device}"
    require(alike, op, both, "one dtype and one device")
    shapes = f"x of shape {tuple(x.shape)} and weight of shape {tuple(weight.shape)}"
    require(x.shape[1] == weight.shape[1], op, shapes, "as many channels in both")
