"""The mean squared error in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def v_mse_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over all elements of (prediction - target)^2, a float32 scalar.

    Both have one shape, which may be any; `target` takes no gradient. Salimans and Ho, "Progressive
    Distillation for Fast Sampling of Diffusion Models" (2022), with v as the target, unweighted.
    """
    return F.mse_loss(prediction.to(torch.promote_types(prediction.dtype, torch.float32)), target)
