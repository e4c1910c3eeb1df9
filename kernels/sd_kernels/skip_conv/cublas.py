"""The 1x1 convolution as one matmul for each source, by torch.mm, which is cuBLAS on a GPU.

The second matmul adds to the output of the first. Sources are read where they are, and both slices
of the gradient of the weights are written into one tensor. The second matmul reads and writes the
output once more, in its epilogue: 2 * K numbers a pixel. A concatenation would write and read 2 *
(C1 + C2) numbers, up to three times as many at the widths of the UNet. The output is rounded
between the two matmuls.

Shape letters: M pixels (B * H * W), C1 and C2 channels of the sources, K of the output.
"""

from __future__ import annotations

from typing import Any

import torch

from sd_kernels.errors import require

OP = "skip_conv"


def _rows(image: torch.Tensor) -> torch.Tensor:
    """The view (M, C) of a channels-last image (B, C, H, W)."""
    return image.permute(0, 2, 3, 1).view(-1, image.shape[1])


def _images(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Rows (M, C) as channels-last images with the samples, rows and columns of `like`."""
    B, _, H, W = like.shape
    return rows.view(B, H, W, rows.shape[1]).permute(0, 3, 1, 2)


@torch.library.custom_op("sd_kernels::skip_conv_forward", mutates_args=())
def skip_conv_forward(
    x: torch.Tensor, weight: torch.Tensor, skip: torch.Tensor | None
) -> torch.Tensor:
    """The output (B, K, H, W) in channels-last memory."""
    C1, weights = x.shape[1], weight.flatten(1)
    y = torch.mm(_rows(x), weights[:, :C1].t())
    if skip is not None:
        y.addmm_(_rows(skip), weights[:, C1:].t())
    return _images(y, x)


@torch.library.custom_op("sd_kernels::skip_conv_dgrad", mutates_args=())
def skip_conv_dgrad(
    dy: torch.Tensor, weight: torch.Tensor, C1: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x (C1 channels) and of skip (the others; empty where there are none)."""
    weights, grad = weight.flatten(1), _rows(dy.contiguous(memory_format=torch.channels_last))
    dx = _images(torch.mm(grad, weights[:, :C1]), dy)
    if weights.shape[1] == C1:
        return dx, dy.new_empty(0)
    return dx, _images(torch.mm(grad, weights[:, C1:]), dy)


@torch.library.custom_op("sd_kernels::skip_conv_wgrad", mutates_args=())
def skip_conv_wgrad(dy: torch.Tensor, x: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
    """Gradient of the weight (K, C1 + C2, 1, 1)."""
    C1, grad = x.shape[1], _rows(dy.contiguous(memory_format=torch.channels_last))
    dweight = x.new_empty(grad.shape[1], C1 + (0 if skip is None else skip.shape[1]))
    torch.mm(grad.t(), _rows(x), out=dweight[:, :C1])
    if skip is not None:
        torch.mm(grad.t(), _rows(skip), out=dweight[:, C1:])
    return dweight[:, :, None, None]


def _channels_last(like: torch.Tensor, channels: int) -> torch.Tensor:
    B, _, H, W = like.shape
    return like.new_empty(B, H, W, channels).permute(0, 3, 1, 2)


@skip_conv_forward.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
    return _channels_last(x, weight.shape[0])


@skip_conv_dgrad.register_fake
def _(dy: torch.Tensor, weight: torch.Tensor, C1: int) -> tuple[torch.Tensor, torch.Tensor]:
    C2 = weight.shape[1] - C1
    return _channels_last(dy, C1), _channels_last(dy, C2) if C2 else dy.new_empty(0)


@skip_conv_wgrad.register_fake
def _(dy: torch.Tensor, x: torch.Tensor, skip: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(dy.shape[1], x.shape[1] + (0 if skip is None else skip.shape[1]), 1, 1)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, skip = inputs
    ctx.save_for_backward(x, weight, *(() if skip is None else (skip,)))


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight, *others = ctx.saved_tensors
    wants_x, wants_weight, wants_skip = ctx.needs_input_grad
    dx, dskip = skip_conv_dgrad(dy, weight, x.shape[1]) if wants_x or wants_skip else (None, None)
    dweight = skip_conv_wgrad(dy, x, others[0] if others else None) if wants_weight else None
    return dx, dweight, dskip if others else None


skip_conv_forward.register_autograd(_backward, setup_context=_save)


def skip_conv(
    x: torch.Tensor, weight: torch.Tensor, skip: torch.Tensor | None = None
) -> torch.Tensor:
    """See `reference.skip_conv`; sources in channels-last memory, pixels may be apart.

    The result is dense in channels-last memory. KernelError for other inputs.
    """
    sources = {"x": x} if skip is None else {"x": x, "skip": skip}
    for name, image in sources.items():
        what = f"{name} of shape {tuple(image.shape)}"
        require(
            image.dim() == 4 and image.numel() > 0,
            OP,
            what,
            "images (B, C, H, W), none of them empty",
        )
        B, C, H, W = image.shape
        require(
            (x.shape[0], *x.shape[2:]) == (B, H, W),
            OP,
            what,
            f"images like x, of shape {tuple(x.shape)}",
        )
        require(image.is_floating_point(), OP, f"{name} of {image.dtype}", "floating-point numbers")
        require(
            _has_rows(image), OP, f"{what} with strides {image.stride()}", "channels-last memory"
        )
    tensors = [*sources.values(), weight]
    dtypes, devices = ({str(getattr(t, name)) for t in tensors} for name in ("dtype", "device"))
    both = f"{' and '.join(sorted(dtypes))} on {' and '.join(sorted(devices))}"
    require(len(dtypes) == len(devices) == 1, OP, both, "one dtype and one device")
    C = sum(image.shape[1] for image in sources.values())
    suitable = (
        weight.dim() == 4 and weight.shape[1:] == (C, 1, 1) and (weight.stride(1) == 1 or C == 1)
    )
    strides = f"weight of shape {tuple(weight.shape)} with strides {weight.stride()}"
    require(suitable, OP, strides, f"weight (K, {C}, 1, 1), channels adjacent")
    return skip_conv_forward(x, weight, skip)


def _has_rows(image: torch.Tensor) -> bool:
    """Whether the image can be viewed as rows of adjacent channels."""
    try:
        return _rows(image).stride(1) == 1 or image.shape[1] == 1
    except RuntimeError:  # torch has no such view where pixels are not evenly apart
        return False
