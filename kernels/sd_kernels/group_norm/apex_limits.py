"""The inputs that Apex's NHWC group norm kernels take; its module gives others to torch.

Source: the class `GroupNorm` in apex/contrib/group_norm/group_norm.py, at the commit in `apex`.
"""

from __future__ import annotations

import torch

CHANNELS = (
    *(128, 256, 320, 384, 448, 512, 640, 768, 896, 960, 1024, 1280),
    *(1344, 1536, 1792, 1920, 2048, 2240, 2560, 2688, 3072, 3136, 3584, 4096),
)
GROUPS = (16, 32)


def refusal(channels: int, num_groups: int, dtype: torch.dtype) -> str:
    """Why Apex has no kernel for such a call, or an empty string."""
    if num_groups not in GROUPS:
        return f"Apex has kernels for 16 and 32 groups, not {num_groups}"
    if channels not in CHANNELS:
        return f"Apex has no kernel for {channels} channels"
    return (
        ""
        if dtype in (torch.float32, torch.bfloat16, torch.float16)
        else f"Apex has no kernel for {dtype}"
    )
