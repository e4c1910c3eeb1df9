"""A linear layer by torch, on a GPU by cuBLAS, which adds the bias in its epilogue.

Shape letters: K columns in, N columns out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sd_kernels.errors import require, require_floating, require_one_dtype
from sd_kernels.weight_gradient import sink_of, with_sink


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See `reference.linear`; all of one floating dtype, otherwise KernelError.

    The gradient of a weight with a sink goes there (`sd_kernels.weight_gradient`).
    """
    tensors = (x, weight) if bias is None else (x, weight, bias)
    require_floating("linear", *tensors, double=True)
    require_one_dtype("linear", *tensors)
    got = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}" + (
        "" if bias is None else f", bias {tuple(bias.shape)}"
    )
    fits = (
        weight.dim() == 2
        and x.shape[-1:] == weight.shape[1:]
        and (bias is None or bias.shape == weight.shape[:1])
    )
    require(fits, "linear", got, "x (..., K), weight (N, K), bias (N,)")
    if sink := sink_of(weight):
        return with_sink(F.linear(x, weight.detach(), bias), x, weight, sink)
    return F.linear(x, weight, bias)
