"""LayerNorm of a residual sum by torch's own operators; shape letters as in `reference`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from sd_kernels.layer_norm.checks import check


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `reference.layer_norm`."""
    check(x, weight, bias, residual, double=True)
    summed = x if residual is None else x + residual
    inputs = summed, weight, bias
    if not x.is_cuda:
        # On a CPU torch's kernel keeps statistics and sums in low precision, with twice the error
        # that the harness allows.
        inputs = summed.float(), weight.float(), bias.float()
    return F.layer_norm(inputs[0], summed.shape[-1:], *inputs[1:], eps).to(x.dtype), summed
