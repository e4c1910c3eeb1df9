"""The 1x1 convolution as a matmul, by torch.mm, which is cuBLAS on a GPU.

Images are read as rows of pixels where they lie, and both gradients are matmuls of the same rows.

Shape letters: M pixels (B * H * W), C channels of the input, K of the output.
"""

from __future__ import annotations

from typing import Any

import torch

from sd_kernels.errors import require
from sd_kernels.weight_gradient import sink_of, with_sink

OP = "skip_conv"


def _rows(image: torch.Tensor) -> torch.Tensor:
    """The view (M, C) of a channels-last image (B, C, H, W)."""
    return image.permute(0, 2, 3, 1).view(-1, image.shape[1])


def _images(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Rows (M, C) as channels-last images with the samples, rows and columns of `like`."""
    B, _, H, W = like.shape
    return rows.view(B, H, W, rows.shape[1]).permute(0, 3, 1, 2)


@torch.library.custom_op("sd_kernels::skip_conv_forward", mutates_args=())
def skip_conv_forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The output (B, K, H, W) in channels-last memory."""
    return _images(torch.mm(_rows(x), weight.flatten(1).t()), x)


@torch.library.custom_op("sd_kernels::skip_conv_dgrad", mutates_args=())
def skip_conv_dgrad(dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Gradient of x (B, C, H, W)."""
    grad = _rows(dy.contiguous(memory_format=torch.channels_last))
    return _images(torch.mm(grad, weight.flatten(1)), dy)


@torch.library.custom_op("sd_kernels::skip_conv_wgrad", mutates_args=())
def skip_conv_wgrad(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Gradient of the weight (K, C, 1, 1)."""
    grad = _rows(dy.contiguous(memory_format=torch.channels_last))
    return torch.mm(grad.t(), _rows(x))[:, :, None, None]


def _channels_last(like: torch.Tensor, channels: int) -> torch.Tensor:
    B, _, H, W = like.shape
    return like.new_empty(B, H, W, channels).permute(0, 3, 1, 2)


@skip_conv_forward.register_fake
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _channels_last(x, weight.shape[0])


@skip_conv_dgrad.register_fake
def _(dy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _channels_last(dy, weight.shape[1])


@skip_conv_wgrad.register_fake
def _(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(dy.shape[1], x.shape[1], 1, 1)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wants_x, wants_weight = ctx.needs_input_grad
    dx = skip_conv_dgrad(dy, weight) if wants_x else None
    return dx, skip_conv_wgrad(dy, x) if wants_weight else None


skip_conv_forward.register_autograd(_backward, setup_context=_save)


def skip_conv(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """See `reference.skip_conv`; x in channels-last memory, pixels may be apart.

    The result is dense in channels-last memory. The gradient of a weight with a sink goes there
    (`sd_kernels.weight_gradient`). KernelError for other inputs.
    """
    what = f"x of shape {tuple(x.shape)}"
    is_image = x.dim() == 4 and x.numel() > 0
    require(is_image, OP, what, "images (B, C, H, W), none of them empty")
    require(x.is_floating_point(), OP, f"x of {x.dtype}", "floating-point numbers")
    require(_has_rows(x), OP, f"{what} with strides {x.stride()}", "channels-last memory")
    dtypes, devices = ({str(getattr(t, name)) for t in (x, weight)} for name in ("dtype", "device"))
    both = f"{' and '.join(sorted(dtypes))} on {' and '.join(sorted(devices))}"
    require(len(dtypes) == len(devices) == 1, OP, both, "one dtype and one device")
    C = x.shape[1]
    suitable = (
        weight.dim() == 4 and weight.shape[1:] == (C, 1, 1) and (weight.stride(1) == 1 or C == 1)
    )
    strides = f"weight of shape {tuple(weight.shape)} with strides {weight.stride()}"
    require(suitable, OP, strides, f"weight (K, {C}, 1, 1), channels adjacent")
    if sink := sink_of(weight):
        # Rows of pixels are the last but one axis here, as those of tokens are in a linear layer.
        rows = skip_conv_forward(x, weight.detach()).permute(0, 2, 3, 1)
        return with_sink(rows, x.permute(0, 2, 3, 1), weight, sink).permute(0, 3, 1, 2)
    return skip_conv_forward(x, weight)


def _has_rows(image: torch.Tensor) -> bool:
    """Whether the image can be viewed as rows of adjacent channels."""
    try:
        return _rows(image).stride(1) == 1 or image.shape[1] == 1
    except RuntimeError:  # torch has no such view where pixels are not evenly apart
        return False
