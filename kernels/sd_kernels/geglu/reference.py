"""GEGLU in plain torch.

Shape letter: N columns of the output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def geglu(x: torch.Tensor) -> torch.Tensor:
    """value * gelu(gate), (..., N), for x (..., 2N): value in the first half, gate in the second.

    Shazeer, "GLU Variants Improve Transformer" (2020), eq. 5, with the exact (erf) GELU. Any
    floating dtype.
    """
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)
