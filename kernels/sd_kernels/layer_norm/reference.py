"""Residual sum and LayerNorm in plain torch.

Shape letter: C columns.
"""

from __future__ import annotations

import torch


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None = None,
    x_bias: torch.Tensor | None = None,
    later_bias: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """LayerNorm of x + residual (..., C) over the last axis, and that sum.

    Without a residual the sum is x itself. weight and bias are (C,); all have one dtype, and
    statistics are float32 at least. Ba, Kiros and Hinton, "Layer Normalization" (2016).

    `x_bias` and `later_bias` (C,) are not added. The former is the bias of the layer that made x,
    the latter that of a layer to whose result the sum will be added. Their gradients are those of x
    and of the later uses of the sum, summed over rows, which a backward pass that has these
    gradients in registers adds up without another. The layers themselves take them detached.
    """
    x = _containing(x, x_bias)
    summed = x if residual is None else x + residual
    wide, weight, bias = (
        t if t.dtype == torch.float64 else t.float() for t in (summed, weight, bias)
    )
    centred = wide - wide.mean(-1, keepdim=True)
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    normal = (centred * rstd * weight + bias).to(x.dtype)
    return normal, _containing(summed, later_bias)


def _containing(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x as a function of the bias that is in it already."""
    return x if bias is None else x + (bias - bias.detach())
