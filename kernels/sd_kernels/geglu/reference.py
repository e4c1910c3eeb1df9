"""GEGLU in plain torch.

Shape letter: N columns of the output.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def geglu(x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """value * gelu(gate), (..., N), for x + bias (..., 2N): value in the first half, then gate.

    The bias (2N,) is that of the linear layer that made x. Shazeer, "GLU Variants Improve
    Transformer" (2020), eq. 5, with the exact (erf) GELU. Any floating dtype.
    """
    value, gate = (x if bias is None else x + bias).chunk(2, dim=-1)
    return value * F.gelu(gate)
