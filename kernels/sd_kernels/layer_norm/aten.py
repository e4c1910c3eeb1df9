"""LayerNorm of a residual sum by torch's own operators; shape letters as in `reference`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from sd_kernels.layer_norm.checks import check


class _Containing(torch.autograd.Function):
    """x as a function of the bias that is in it already: nothing forward, one sum backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        [grad] = grads
        return grad, grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None


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
    """See `reference.layer_norm`."""
    check(x, weight, bias, residual, x_bias, later_bias, double=True)
    x = _Containing.apply(x, x_bias)
    summed = x if residual is None else x + residual
    inputs = summed, weight, bias
    if not x.is_cuda:
        # On a CPU torch's kernel keeps statistics and sums in low precision, with twice the error
        # that the harness allows.
        inputs = summed.float(), weight.float(), bias.float()
    normal = F.layer_norm(inputs[0], summed.shape[-1:], *inputs[1:], eps).to(x.dtype)
    return normal, _Containing.apply(summed, later_bias)
