"""The checks of inputs that all backends of this op share; shape letters as in `reference`."""

from __future__ import annotations

import torch

from sd_kernels.errors import require, require_floating, require_one_dtype

OP = "layer_norm"


def check(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    x_bias: torch.Tensor | None,
    later_bias: torch.Tensor | None,
    double: bool = False,
) -> None:
    """Raise KernelError unless x and residual are (..., C), and all others (C,).

    All must have one dtype and device; `double` allows float64.
    """
    optional = {"residual": residual, "x_bias": x_bias, "later_bias": later_bias}
    others = {"weight": weight, "bias": bias}
    others |= {name: tensor for name, tensor in optional.items() if tensor is not None}
    require_floating(OP, x, *others.values(), double=double)
    require_one_dtype(OP, x, *others.values())
    require(x.dim() > 0, OP, "a number as x", "a last axis to normalise")
    for name, tensor in others.items():
        shape = x.shape if name == "residual" else x.shape[-1:]
        got = f"{name} of shape {tuple(tensor.shape)}"
        require(
            tensor.shape == shape, OP, got, f"{tuple(shape)} beside x of shape {tuple(x.shape)}"
        )
