"""The checks of inputs that all backends of this op share; shape letters as in `reference`."""

from __future__ import annotations

import torch

from sd_kernels.errors import require, require_floating, require_one_dtype
from sd_kernels.fp8_linear.scaling import SLOTS, Scales

OP = "fp8_linear"
PRODUCERS = ("none", "geglu", "layer_norm", "feed_forward")
NORMED = ("layer_norm", "feed_forward")
"""producers that begin with LayerNorm"""


def check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    inner_weight: torch.Tensor | None,
    inner_bias: torch.Tensor | None,
    producer: str,
    scales: Scales | None,
) -> None:
    """Raise KernelError unless shapes and dtypes fit, and the producer has its parts and no others.

    Shapes are those of `reference.fp8_linear`; widths of weights are multiples of 16.
    """
    given = x, weight, bias, residual, norm_weight, norm_bias, inner_weight, inner_bias
    tensors = [tensor for tensor in given if tensor is not None]
    require_floating(OP, *tensors)
    require_one_dtype(OP, *tensors)
    require(producer in PRODUCERS, OP, f"producer {producer!r}", ", ".join(PRODUCERS))
    for matrix in (weight, inner_weight):
        if matrix is not None:
            fits = matrix.dim() == 2 and matrix.shape[0] % 16 == matrix.shape[1] % 16 == 0
            got = f"a weight of shape {tuple(matrix.shape)}"
            require(fits, OP, got, "(N, K), both multiples of 16")
    is_norm, is_feed_forward = producer in NORMED, producer == "feed_forward"
    complete = is_norm == (norm_weight is not None) == (norm_bias is not None)
    complete &= is_norm or residual is None
    complete &= is_feed_forward == (inner_weight is not None)
    complete &= is_feed_forward or inner_bias is None
    got = f"producer {producer!r} with other parts than its own"
    require(complete, OP, got, "norm's parameters and an inner layer where the producer has them")
    N, K = weight.shape
    # The columns of x, and the shapes of what must fit them.
    width = inner_weight.shape[1] if inner_weight is not None else K * (1 + (producer == "geglu"))
    got = f"x of shape {tuple(x.shape)}"
    require(x.shape[-1:] == (width,), OP, got, f"a last axis of {width} for this weight")
    parts = {"bias": (bias, (N,)), "residual": (residual, tuple(x.shape))}
    parts |= {"norm_weight": (norm_weight, (width,)), "norm_bias": (norm_bias, (width,))}
    parts |= {"inner_weight": (inner_weight, (2 * K, width)), "inner_bias": (inner_bias, (2 * K,))}
    for name, (part, shape) in parts.items():
        if part is not None:
            got = f"{name} of shape {tuple(part.shape)}"
            require(part.shape == shape, OP, got, f"{shape} beside x and weight")
    slots = SLOTS * (1 + is_feed_forward)
    for name, tensor in ({} if scales is None else scales._asdict()).items():
        got = f"{name} of shape {tuple(tensor.shape)}, {tensor.dtype}"
        fits = tensor.shape == (slots,) and tensor.dtype == torch.float32
        require(fits, OP, got, f"({slots},) float32 for producer {producer}")
