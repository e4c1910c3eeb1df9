"""The checks of inputs that all backends of this op share; shape letters as in `reference`."""

from __future__ import annotations

import torch

from sd_kernels.errors import require, require_floating, require_one_dtype

OP = "fp8_linear"
PRODUCERS = ("none", "geglu", "layer_norm")


def check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    producer: str,
) -> None:
    """Raise KernelError unless shapes and dtypes fit, and the producer has its parts and no others.

    x is (..., K), or (..., 2K) for GEGLU; N and K are multiples of 16.
    """
    tensors = [
        tensor
        for tensor in (x, weight, bias, residual, norm_weight, norm_bias)
        if tensor is not None
    ]
    require_floating(OP, *tensors)
    require_one_dtype(OP, *tensors)
    require(producer in PRODUCERS, OP, f"producer {producer!r}", ", ".join(PRODUCERS))
    fits = weight.dim() == 2 and weight.shape[0] % 16 == weight.shape[1] % 16 == 0
    require(fits, OP, f"a weight of shape {tuple(weight.shape)}", "(N, K), both multiples of 16")
    N, K = weight.shape
    width = K * (2 if producer == "geglu" else 1)
    require(
        x.shape[-1:] == (width,),
        OP,
        f"x of shape {tuple(x.shape)}",
        f"a last axis of {width} for this weight",
    )
    is_norm = producer == "layer_norm"
    complete = is_norm == (norm_weight is not None) == (norm_bias is not None) and (
        is_norm or residual is None
    )
    got = f"producer {producer!r} with other parts than its own"
    require(complete, OP, got, "norm's parameters for layer_norm alone")
    parts = {"bias": (bias, (N,)), "residual": (residual, tuple(x.shape))}
    parts |= {"norm_weight": (norm_weight, (K,)), "norm_bias": (norm_bias, (K,))}
    for name, (part, shape) in parts.items():
        if part is not None:
            require(
                part.shape == shape,
                OP,
                f"{name} of shape {tuple(part.shape)}",
                f"{shape} beside x and weight",
            )
