"""GEGLU in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def geglu(x: torch.Tensor) -> torch.Tensor:
    """value * gelu(gate) of x (..., 2N), value in the first half, gate in the second; (..., N).

    Shazeer, "GLU Variants Improve Transformer" (2020), with the exact (erf) GELU.
    """
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)
